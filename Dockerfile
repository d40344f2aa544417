# The binary, the system's root certificates, and a user of its own.
FROM rust:1.95-bookworm AS build
# What the calls need that train the release: see scripts/release.
RUN apt-get update && apt-get install -y --no-install-recommends nginx-light nghttp2-client openssl python3
WORKDIR /hopguard
COPY . .
RUN make release

FROM debian:bookworm-slim
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /hopguard/target/pgo/hopguard /usr/local/bin/hopguard
ENV HOPGUARD_POLICY=/etc/hopguard
# A number, so that Kubernetes can see that it is not root; no base image uses it.
USER 15001:15001
ENTRYPOINT ["hopguard"]
CMD ["run"]
