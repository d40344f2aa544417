//! Python's `http.server`, the upstream of the README: its listen backlog is 5, and by default it speaks HTTP/1.0, so that
//! each call needs a new connection.

use std::process::Stdio;

use tokio::process::Command;

use crate::support::http::{Http1, empty, request};
use crate::support::upstream::{own_address, policy};
use crate::support::{Mesh, eventually, python};

#[tokio::test]
async fn more_callers_than_the_backlog_of_http_server_admits_are_served() {
    let Some(python) = python() else { return };
    for version in ["HTTP/1.0", "HTTP/1.1"] {
        let address = own_address();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("index.html"), "hello").unwrap();
        let _server = Command::new(&python)
            .args(["-m", "http.server", &address.port().to_string(), "--bind", "127.0.0.1", "--protocol", version])
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        eventually(|| std::net::TcpStream::connect(address).ok()).await;
        for callers in [16, 64] {
            // A connection that the kernel has accepted beyond the backlog is answered only when its request is sent again, over
            // a second later, directly too.
            let patient = policy(address, "    timeouts: { connect: 2s, request: 20s }");
            let mesh = Mesh::with(&patient, |settings| settings.workers = 2).await;
            let to = mesh.addr("in");
            let calls: Vec<_> = (0..callers)
                .map(|_| {
                    tokio::spawn(async move {
                        let mut caller = Http1::open(to).await;
                        for _ in 0..5 {
                            let answer = caller.ask(request("GET", "/").body(empty()).unwrap()).await;
                            assert_eq!(answer.status, 200, "{answer:?}");
                        }
                    })
                })
                .collect();
            for call in calls {
                call.await.unwrap();
            }
            mesh.ended("ok", callers * 5).await;
            assert_eq!(mesh.metric("hopguard_circuit_breaker_changes_total", &["app"]), 0.0, "{version}, {callers}");
            mesh.stop().await;
        }
    }
}
