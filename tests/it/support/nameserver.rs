//! A name server, dnsmasq, and the program where that server is the one that the system's settings name.
//!
//! The settings, `/etc/resolv.conf`, have no field for a port. So the server has port 53 of a loopback address that no
//! other test uses.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use tokio::process::{Child, Command};

use super::etc::Etc;
use super::program::{Program, gather};
use super::{eventually, peer};

/// An address of this machine that is nobody else's.
pub(crate) fn own_address() -> IpAddr {
    static GIVEN: AtomicU8 = AtomicU8::new(64);
    let [.., high, low] = std::process::id().to_be_bytes();
    Ipv4Addr::new(127, GIVEN.fetch_add(1, Relaxed), high, low).into()
}

/// A name server for `shop.test`. It knows no other server: what it is asked of other names it refuses to answer.
pub(crate) struct Nameserver {
    pub(crate) at: IpAddr,
    dnsmasq: PathBuf,
    options: Vec<String>,
    /// The settings of the program, which name this server.
    pub(crate) etc: Etc,
    child: Option<Child>,
    log: Arc<Mutex<Vec<String>>>,
}

impl Nameserver {
    /// Starts it with records that live for a second, and options of dnsmasq for others. `None` where it cannot run and
    /// need not.
    pub(crate) async fn start(records: &[(&str, IpAddr)], options: &[&str]) -> Option<Self> {
        let dnsmasq = peer("dnsmasq")?;
        let at = own_address();
        let etc = Etc::new(&format!("nameserver {at}\nsearch shop.test\noptions timeout:2\n"))?;
        let options = options.iter().map(|option| (*option).to_owned()).collect();
        let mut server = Self { at, dnsmasq, options, etc, child: None, log: Arc::default() };
        server.revive(records).await;
        Some(server)
    }

    /// Starts it again, after [`Self::kill`].
    pub(crate) async fn revive(&mut self, records: &[(&str, IpAddr)]) {
        self.write(records);
        let mut command = Command::new(&self.dnsmasq);
        command.args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--pid-file="]);
        command.args(["--user=root", "--log-queries", "--log-facility=-", "--local=/shop.test/", "--local-ttl=1"]);
        command.args([format!("--listen-address={}", self.at), "--bind-interfaces".to_owned()]);
        command.arg(format!("--addn-hosts={}", self.records().display())).args(&self.options);
        let mut child = command.stderr(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
        self.log = gather(child.stderr.take().unwrap());
        self.child = Some(child);
        self.has_read(1).await;
    }

    /// Gives it other records and waits until it has taken them up.
    pub(crate) async fn set(&self, records: &[(&str, IpAddr)]) {
        let before = self.lines("read ");
        self.write(records);
        let id = self.child.as_ref().unwrap().id().expect("it runs").to_string();
        assert!(Command::new("kill").args(["-s", "HUP", &id]).status().await.unwrap().success());
        self.has_read(before + 1).await;
    }

    /// Ends it, without a word to anybody.
    pub(crate) async fn kill(&mut self) {
        self.child.take().unwrap().kill().await.unwrap();
    }

    /// Takes all that they say out of the settings of programs that are started from now on.
    pub(crate) fn empty_settings(&self) {
        std::fs::write(self.etc.resolv_conf(), "").unwrap();
    }

    /// How often it was asked for the IPv4 addresses of a name.
    pub(crate) fn asked(&self, name: &str) -> usize {
        self.lines(&format!("query[A] {name} from"))
    }

    /// Runs the program with a policy, where this is the name server.
    pub(crate) async fn run(&self, policy: &str) -> Program {
        self.etc.run(policy, &[]).await
    }

    fn records(&self) -> PathBuf {
        self.etc.beside().join("records")
    }

    fn write(&self, records: &[(&str, IpAddr)]) {
        let lines: String = records.iter().map(|(name, address)| format!("{address} {name}\n")).collect();
        std::fs::write(self.records(), lines).unwrap();
    }

    fn lines(&self, with: &str) -> usize {
        self.log.lock().unwrap().iter().filter(|line| line.contains(with)).count()
    }

    async fn has_read(&self, times: usize) {
        eventually(|| (self.lines("read ") >= times).then_some(())).await;
    }
}
