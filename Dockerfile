# The binary, the system's root certificates, and a user of its own.
FROM rust:1.95-bookworm AS build
WORKDIR /hopguard
COPY . .
RUN cargo build --release --locked

FROM debian:bookworm-slim
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /hopguard/target/release/hopguard /usr/local/bin/hopguard
ENV HOPGUARD_POLICY=/etc/hopguard
# A number, so that Kubernetes can see that it is not root; no base image uses it.
USER 15001:15001
ENTRYPOINT ["hopguard"]
CMD ["run"]
