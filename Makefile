# hopguard: the targets of this repository; `make` lists them. Needs GNU make.

CARGO ?= cargo
PYTHON ?= python3
CARGO_DENY_VERSION := 0.20.2
BINARIES ?= target/release/hopguard

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test early-answers bench accept instructions soak-peers advisories build release peers fmt lint unit docs licences words clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## three services on loopback, each with its hopguard: one becomes slow, one fails
	$(CARGO) run --release --locked -- demo

test: peers fmt lint unit docs licences words ## all checks that a change must pass; installs the programs that the tests need

early-answers: peers ## 40 uploads of each client to each server that responds early, directly and through hopguard
	EARLY_ANSWERS=40 $(CARGO) test --locked --test it -- --nocapture --exact peers::early_answers::real_clients_get_an_early_response_every_time

bench: release ## CPU, latency and memory, compared with nginx, HAProxy and Envoy; options in BENCH, for example BENCH="--only h1 --rounds 3"
	$(PYTHON) benches/compare.py $(BENCH)

accept: build ## failures in front of services that accept connections slowly, beside direct calls, ten minutes; options in ACCEPT="--kinds tls --callers 64"
	$(PYTHON) benches/slow_accept.py $(ACCEPT)

# Builds only the binary of this checkout, and only where it is to be measured.
instructions: $(if $(filter target/release/hopguard,$(BINARIES)),build) ## instructions per request; builds to compare in BINARIES="../base/target/release/hopguard target/release/hopguard", options in INSTRUCTIONS="--max-ratio 1.01"
	$(PYTHON) benches/instructions.py $(INSTRUCTIONS) $(BINARIES)

soak-peers: build ## real servers restarted under load, directly and through hopguard; installs them; options in SOAK, for example SOAK="--minutes 10 --only gunicorn,node"
	scripts/peers-servers
	target/peers/venv/bin/python3 benches/soak_peers.py $(SOAK)

advisories: deny ## known vulnerabilities of dependencies; needs the network
	$(CARGO) deny check advisories

build: ## release build without profile, target/release/hopguard
	$(CARGO) build --release --locked

release: ## shipped binary, target/pgo/hopguard: profile-guided optimisation in two builds
	scripts/release

peers: ## install the real clients and servers of the tests
	scripts/peers

fmt: ## check the formatting (`cargo fmt` corrects it)
	$(CARGO) fmt --check

lint: ## clippy, warnings are errors
	$(CARGO) clippy --locked --all-targets -- -D warnings

unit: ## unit, integration and doc tests
	$(CARGO) test --locked --no-fail-fast

docs: ## documentation of the code, warnings are errors
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --locked --no-deps --document-private-items

licences: deny ## licences, bans and sources of the dependencies
	$(CARGO) deny --locked check licenses bans sources

# `git grep` returns 1 for no match; 0 (match) and 128 (no repository) are both failures.
# The patterns are written so that this file does not match them.
words: ## no unfinished work, no disabled tests, no unclear words (scripts/words)
	@git grep --untracked -nIwE 'TOD[O]|FIXM[E]|XX[X]' -- . ':!LICENSE' ':!Cargo.lock'; test $$? -eq 1
	@git grep --untracked -nE '#\[ignor[e]' -- '*.rs'; test $$? -eq 1
	@scripts/words

clean: ## remove everything that was built
	$(CARGO) clean

.PHONY: deny
deny:
	@$(CARGO) deny --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-deny@$(CARGO_DENY_VERSION)
