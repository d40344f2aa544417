//! Reload when something outside the policy files changes: a taken address becomes free, a certificate appears or is replaced.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde_json::Value;
use tempfile::TempDir;
use tokio::time::Duration;

use crate::support::certificates::Authority;
use crate::support::http::get;
use crate::support::program::{Program, replace};
use crate::support::upstream::{Upstream, policy};

/// It looks every five seconds; and a busy machine takes its time.
const LATEST: Duration = Duration::from_secs(20);

async fn until(program: &Program, wanted: impl Fn(&Value) -> bool) -> Value {
    program.policy_until(LATEST, wanted).await
}

fn listeners(policy: &Value) -> usize {
    policy["listeners"].as_array().unwrap().len()
}

struct Site {
    folder: TempDir,
    file: PathBuf,
    upstream: Upstream,
    program: Program,
}

impl Site {
    /// A program whose policy has the listener `in`.
    async fn open() -> Self {
        let upstream = Upstream::fixed("hello").await;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("policy.yaml");
        std::fs::write(&file, text(upstream.addr, "")).unwrap();
        let program = Program::run(&file, &[]).await;
        Self { folder, file, upstream, program }
    }

    /// Gives the policy one listener more, or none.
    fn write(&self, more: &str) {
        replace(&self.file, &text(self.upstream.addr, more));
    }
}

fn text(upstream: SocketAddr, more: &str) -> String {
    policy(upstream, "    timeouts: { request: 20s }").replace("destinations:", &format!("{more}destinations:"))
}

const WITH_TLS: &str =
    "  - { name: tls, bind: \"127.0.0.1:0\", to: app, tls: { certificate: ca/tls.crt, key: ca/tls.key } }\n";

#[tokio::test]
async fn a_policy_comes_into_force_when_the_address_that_was_taken_is_free() {
    let site = Site::open().await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    site.write(&format!("  - {{ name: second, bind: \"{address}\", to: app }}\n"));
    until(&site.program, |policy| policy["lastError"]["message"].to_string().contains("in use")).await;
    // It is tried again and again, and says so once.
    site.program.signal("HUP").await;
    site.program.said("SIGHUP").await;
    drop(taken);
    until(&site.program, |policy| listeners(policy) == 2 && policy["lastError"].is_null()).await;
    assert_eq!(get(address, "/").await.body, "hello");
    let log = site.program.log();
    assert_eq!(log.matches("the changed policy was rejected").count(), 1, "{log}");
    assert_eq!(site.program.metric("hopguard_policy_reloads_total", &["result=\"failed\""]).await, 1.0);
}

#[tokio::test]
async fn a_policy_comes_into_force_when_its_certificate_is_there() {
    let (site, authority) = (Site::open().await, Authority::new());
    let ca = site.folder.path().join("ca");
    std::fs::create_dir(&ca).unwrap();
    site.write(WITH_TLS);
    until(&site.program, |policy| policy["lastError"]["message"].to_string().contains("tls.crt")).await;
    authority.issue("shop.test").write(&ca);
    until(&site.program, |policy| listeners(policy) == 2 && policy["lastError"].is_null()).await;
    let to = site.program.addr("tls").await.unwrap();
    assert!(authority.connect(to, "shop.test", &[]).await.is_ok());
}

#[tokio::test]
async fn a_policy_that_names_other_certificates_reloads_none() {
    let site = Site::open().await;
    let ca = site.folder.path().join("ca");
    std::fs::create_dir(&ca).unwrap();
    Authority::new().issue("shop.test").write(&ca);
    for (more, wanted) in [(WITH_TLS, 2), ("", 1), (WITH_TLS, 2), ("", 1), (WITH_TLS, 2)] {
        site.write(more);
        until(&site.program, |policy| listeners(policy) == wanted).await;
    }
    assert_eq!(site.program.metric("hopguard_certificate_reloads_total", &[]).await, 0.0, "{}", site.program.log());
    std::fs::write(ca.join("tls.key"), "no key").unwrap();
    until(&site.program, |policy| !policy["certificateError"].is_null()).await;
    site.write("");
    until(&site.program, |policy| listeners(policy) == 1 && policy["certificateError"].is_null()).await;
}
