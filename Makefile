# hopguard: what can be done with this checkout. `make` lists it. GNU make.

CARGO ?= cargo
PYTHON ?= python3
CARGO_DENY_VERSION := 0.20.2
BINARIES ?= target/release/hopguard

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test bench instructions advisories build release peers fmt lint unit docs licences words clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## three services behind their hopguards, on loopback: what hopguard does when one turns slow and one fails
	$(CARGO) run --release --locked -- demo

test: peers fmt lint unit docs licences words ## everything that a change must pass; installs what the tests need

bench: release ## CPU, latency and memory beside nginx, HAProxy and Envoy; options in BENCH, as in BENCH="--only h1 --rounds 3"
	$(PYTHON) benches/compare.py $(BENCH)

# Builds only the binary of this checkout, and only where it is to be measured.
instructions: $(if $(filter target/release/hopguard,$(BINARIES)),build) ## instructions per request; builds to compare in BINARIES="../base/target/release/hopguard target/release/hopguard", options in INSTRUCTIONS="--max-ratio 1.01"
	$(PYTHON) benches/instructions.py $(INSTRUCTIONS) $(BINARIES)

advisories: deny ## known security faults in dependencies; needs the network
	$(CARGO) deny check advisories

build: ## a quick release build, target/release/hopguard
	$(CARGO) build --release --locked

release: ## the binary as it is shipped, target/pgo/hopguard: built twice, the second time with what calls through the first one showed
	scripts/release

peers: ## the real clients and servers that the tests talk to
	scripts/peers

fmt: ## formatting (changes nothing; `cargo fmt` does)
	$(CARGO) fmt --check

lint: ## clippy, with every warning an error
	$(CARGO) clippy --locked --all-targets -- -D warnings

unit: ## unit, integration and doc tests
	$(CARGO) test --locked --no-fail-fast

docs: ## the documentation of the code, with every warning an error
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items

licences: deny ## licences, bans and sources of the dependencies
	$(CARGO) deny --locked check licenses bans sources

# `git grep` ends with 1 where it found nothing; 0 (found) and 128 (no repository) are both failures.
# The words are written so that this file does not contain them.
words: ## words that mean "not finished", and tests that are switched off
	@git grep --untracked -nIwE 'TOD[O]|FIXM[E]|XX[X]' -- . ':!LICENSE' ':!Cargo.lock'; test $$? -eq 1
	@git grep --untracked -nE '#\[ignor[e]' -- '*.rs'; test $$? -eq 1

clean: ## removes everything that was built
	$(CARGO) clean

.PHONY: deny
deny:
	@$(CARGO) deny --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-deny@$(CARGO_DENY_VERSION)
