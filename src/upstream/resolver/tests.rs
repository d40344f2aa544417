//! Tests of the files: the hosts file, and when a change is seen.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::*;

const SERVER: &str = "nameserver 10.0.0.1\n";

fn resolver(folder: &Path) -> SystemResolver {
    SystemResolver::with_files(ResolverFiles::in_folder(folder), ResolverEnvironment::default()).unwrap()
}

/// Looks until the files have settled.
fn look(resolver: &SystemResolver) -> SettingsLook {
    match resolver.look_at_settings() {
        SettingsLook::Settling => resolver.look_at_settings(),
        look => look,
    }
}

fn search_domain(resolver: &SystemResolver) -> String {
    resolver.current.borrow().servers.settings().search.join(" ")
}

#[test]
fn a_file_that_is_edited_replaced_removed_or_created_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("resolv.conf");
    let text = |domain: &str| format!("{SERVER}search {domain}\n");
    fs::write(&file, text("a.test")).unwrap();
    let resolver = resolver(folder.path());
    assert_eq!((look(&resolver), search_domain(&resolver).as_str()), (SettingsLook::Same, "a.test"));
    fs::write(&file, text("b.test")).unwrap();
    assert_eq!((look(&resolver), search_domain(&resolver).as_str()), (SettingsLook::Changed, "b.test"));
    fs::write(folder.path().join("new"), text("c.test")).unwrap();
    fs::rename(folder.path().join("new"), &file).unwrap();
    assert_eq!((look(&resolver), search_domain(&resolver).as_str()), (SettingsLook::Changed, "c.test"));
    assert_eq!(look(&resolver), SettingsLook::Same);
    fs::remove_file(&file).unwrap();
    assert_eq!(look(&resolver), SettingsLook::Changed);
    assert_eq!(resolver.current.borrow().servers.settings().servers, ["127.0.0.1:53".parse().unwrap()]);
    fs::write(&file, text("d.test")).unwrap();
    assert_eq!((look(&resolver), search_domain(&resolver).as_str()), (SettingsLook::Changed, "d.test"));
}

#[test]
fn a_link_that_leads_elsewhere_is_followed() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    for name in ["first", "second"] {
        fs::create_dir(root.join(name)).unwrap();
        fs::write(root.join(name).join("resolv.conf"), format!("{SERVER}search {name}.test\n")).unwrap();
    }
    symlink("first", root.join("..data")).unwrap();
    symlink("..data/resolv.conf", root.join("resolv.conf")).unwrap();
    let resolver = resolver(root);
    symlink("second", root.join("new")).unwrap();
    fs::rename(root.join("new"), root.join("..data")).unwrap();
    assert_eq!((look(&resolver), search_domain(&resolver).as_str()), (SettingsLook::Changed, "second.test"));
}

#[test]
fn a_file_that_is_being_written_is_not_read_yet() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("resolv.conf");
    fs::write(&file, format!("{SERVER}search a.test\n")).unwrap();
    let resolver = resolver(folder.path());
    for text in ["", SERVER, "nameserver 10.0.0.1\nsearch b.te"] {
        fs::write(&file, text).unwrap();
        assert_eq!(resolver.look_at_settings(), SettingsLook::Settling);
    }
    assert_eq!(search_domain(&resolver), "a.test");
    fs::write(&file, "nameserver 10.0.0.1\nsearch b.test\n").unwrap();
    let looks = [resolver.look_at_settings(), resolver.look_at_settings(), resolver.look_at_settings()];
    assert_eq!(looks, [SettingsLook::Settling, SettingsLook::Changed, SettingsLook::Same]);
    assert_eq!(search_domain(&resolver), "b.test");
}

#[test]
fn with_no_reload_only_the_hosts_file_is_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("resolv.conf");
    fs::write(&file, format!("{SERVER}search a.test\noptions no-reload\n")).unwrap();
    let resolver = resolver(folder.path());
    fs::write(&file, SERVER).unwrap();
    assert_eq!((look(&resolver), search_domain(&resolver).as_str()), (SettingsLook::Same, "a.test"));
    fs::write(folder.path().join("hosts"), "10.0.0.7 app\n").unwrap();
    assert_eq!(look(&resolver), SettingsLook::Changed);
}

#[tokio::test]
async fn the_hosts_file_answers_without_a_name_server() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("resolv.conf"), format!("{SERVER}search shop.test\noptions ndots:5\n")).unwrap();
    let hosts = b"10.0.0.7 app App.Shop.test # \xff\n10.0.0.8 app\nfd00::1\tsix app\n10.0.0.9 my_app\nrubbish\n";
    fs::write(folder.path().join("hosts"), hosts).unwrap();
    let resolver = resolver(folder.path());
    for (name, wanted) in [
        ("app", "fd00::1 10.0.0.7 10.0.0.8"),
        ("APP", "fd00::1 10.0.0.7 10.0.0.8"),
        ("app.shop.test.", "10.0.0.7"),
        ("six", "fd00::1"),
        ("my_app", "10.0.0.9"),
        ("10.1.2.3", "10.1.2.3"),
        ("::7", "::7"),
    ] {
        let addresses = resolver.resolve(name).await.unwrap().addresses;
        let addresses: Vec<_> = addresses.iter().map(IpAddr::to_string).collect();
        assert_eq!(addresses.join(" "), wanted, "{name}");
    }
}

#[tokio::test]
async fn localhost_needs_neither_file_nor_name_server() {
    let folder = tempfile::tempdir().unwrap();
    let addresses = resolver(folder.path()).resolve("localhost").await.unwrap().addresses;
    assert_eq!(addresses, [IpAddr::from([127, 0, 0, 1]), "::1".parse().unwrap()]);
}
