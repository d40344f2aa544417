//! Resolver settings of its own for a program: a folder that is mounted over `/etc`, in a mount namespace. This needs root.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use tempfile::TempDir;
use tokio::process::Command;
use tokio::time::timeout;

use super::program::{Program, hopguard};
use super::{SOON, missing};

/// Mounts the folder for the command after it.
const WITH_ETC: &str = r#"mount --bind "$1" /etc && shift && exec "$@""#;

/// Variables for a program.
pub(crate) type Variables<'a> = &'a [(&'a str, &'a str)];

/// The folder with the settings.
pub(crate) struct Etc {
    folder: TempDir,
}

impl Etc {
    /// Settings with the system's hosts file. `None` if the test does not run as root and need not.
    pub(crate) fn new(resolv_conf: &str) -> Option<Self> {
        let namespace = std::process::Command::new("unshare").args(["--mount", "true"]).stderr(Stdio::null()).status();
        if !namespace.is_ok_and(|status| status.success()) {
            return missing("the right to mount", "resolver settings of its own need root");
        }
        let etc = Self { folder: tempfile::tempdir().unwrap() };
        std::fs::create_dir(etc.path()).unwrap();
        std::fs::write(etc.resolv_conf(), resolv_conf).unwrap();
        std::fs::write(etc.hosts(), "127.0.0.1 localhost\n::1 localhost\n").unwrap();
        std::fs::write(etc.path().join("nsswitch.conf"), "hosts: files dns\n").unwrap();
        Some(etc)
    }

    /// A folder for other files.
    pub(crate) fn beside(&self) -> &Path {
        self.folder.path()
    }

    /// The folder that is `/etc` for the program.
    pub(crate) fn path(&self) -> PathBuf {
        self.folder.path().join("etc")
    }

    pub(crate) fn resolv_conf(&self) -> PathBuf {
        self.path().join("resolv.conf")
    }

    pub(crate) fn hosts(&self) -> PathBuf {
        self.path().join("hosts")
    }

    /// Runs the program with a policy.
    pub(crate) async fn run(&self, policy: &str, variables: Variables<'_>) -> Program {
        let file = self.folder.path().join("policy.yaml");
        std::fs::write(&file, policy).unwrap();
        let mut inner =
            hopguard(&["run", "--admin", "127.0.0.1:0", "--log-format", "json", "--workers", "1", "--policy"]);
        inner.arg(file);
        Program::start(self.command(&inner, variables)).await
    }

    /// The addresses that glibc finds for a name, without the kinds of sockets.
    pub(crate) async fn getent(&self, name: &str, variables: Variables<'_>) -> Vec<String> {
        let mut inner = Command::new("getent");
        inner.args(["ahosts", name]);
        let output = timeout(SOON * 2, self.command(&inner, variables).output()).await.expect("getent does not end");
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        let mut addresses: Vec<_> = text.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect();
        addresses.sort();
        addresses.dedup();
        addresses
    }

    fn command(&self, inner: &Command, variables: Variables<'_>) -> Command {
        let inner = inner.as_std();
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", WITH_ETC, "sh"]).arg(self.path());
        command.arg(inner.get_program()).args(inner.get_args());
        for (name, value) in inner.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.env_remove("LOCALDOMAIN").env_remove("RES_OPTIONS").envs(variables.iter().copied());
        command.stdin(Stdio::null()).kill_on_drop(true);
        command
    }
}
