# The hopguard binary, the root certificates of the system, and an unprivileged user.
FROM rust:1.95-bookworm AS build
# For the training load of the release: see scripts/release.
RUN apt-get update && apt-get install -y --no-install-recommends nginx-light nghttp2-client openssl python3
WORKDIR /hopguard
COPY . .
RUN make release

FROM debian:bookworm-slim
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /hopguard/target/pgo/hopguard /usr/local/bin/hopguard
ENV HOPGUARD_POLICY=/etc/hopguard
# A number, so that Kubernetes can verify that it is not root; no base image uses 15001.
USER 15001:15001
ENTRYPOINT ["hopguard"]
CMD ["run"]
