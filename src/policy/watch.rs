//! Watches the policy's files and notices when they may have changed.
//!
//! Watches folders, not files: an editor replaces a file by renaming another one over it, and a ConfigMap mount swaps
//! the link `..data`; a watch on the file itself sees the first replacement and none after it. Any part of a path may
//! be a link, so the folders that contain those links are watched too. Every five seconds it reports a possible change
//! without an event, because some mounts send no events, and a folder that was removed and created again needs a new
//! watch. The caller compares the contents.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// Several events of one change come together: the change is complete this long after the last event.
const SETTLE: Duration = Duration::from_millis(100);
/// Upper bound of that wait, so that a change is seen within a second even if events keep coming.
const SETTLE_MOST: Duration = Duration::from_millis(700);
/// Interval of looks without an event.
const LOOK: Duration = Duration::from_secs(5);
/// The same if the system sends no events, so that a change is seen within a second.
const LOOK_BLIND: Duration = Duration::from_millis(900);

/// A watch on files and directories, which need not exist.
pub struct PolicyWatch {
    paths: Vec<PathBuf>,
    watcher: Option<RecommendedWatcher>,
    armed: BTreeSet<PathBuf>,
    event: Arc<Notify>,
    /// An event has arrived for which [`PolicyWatch::changed`] has not returned yet.
    is_due: bool,
    next_look: Instant,
}

impl PolicyWatch {
    /// Watches these paths from now on. Must be called on a runtime with a timer.
    ///
    /// If the system refuses a watch (for example at its limit of watches), `changed` returns every 0.9 s instead.
    pub fn new(paths: impl IntoIterator<Item = PathBuf>) -> Self {
        let event = Arc::new(Notify::new());
        let waker = Arc::clone(&event);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading a file is an event too, and the loader must not wake itself.
            if !event.is_ok_and(|event| event.kind.is_access()) {
                waker.notify_one();
            }
        });
        let paths = paths.into_iter().map(|path| std::path::absolute(&path).unwrap_or(path)).collect();
        let (watcher, armed, next_look) = (watcher.ok(), BTreeSet::new(), Instant::now());
        let mut watch = Self { paths, watcher, armed, event, is_due: false, next_look };
        watch.arm();
        watch
    }

    /// Waits until the files may have changed: 0.1 s after the last event, because a file that is still being written
    /// is incomplete, or after five seconds without an event.
    ///
    /// Dropping the future loses no event: the next call returns for it.
    pub async fn changed(&mut self) {
        if !self.is_due && timeout_at(self.next_look, self.event.notified()).await.is_err() {
            self.disarm();
            self.arm();
            return;
        }
        self.is_due = true;
        let latest = Instant::now() + SETTLE_MOST;
        let quiet = || latest.min(Instant::now() + SETTLE);
        while timeout_at(quiet(), self.event.notified()).await.is_ok() && Instant::now() < latest {}
        self.is_due = false;
        self.arm();
    }

    /// Watches the folders that exist now and are not watched yet.
    fn arm(&mut self) {
        let look = if self.watcher.is_some() { LOOK } else { LOOK_BLIND };
        self.next_look = Instant::now() + look;
        let folders: BTreeSet<PathBuf> = self.paths.iter().flat_map(|path| folders(path)).collect();
        let Some(watcher) = &mut self.watcher else { return };
        for gone in self.armed.difference(&folders) {
            // If the folder has been removed, its watch has ended by itself.
            watcher.unwatch(gone).ok();
        }
        self.armed.retain(|folder| folders.contains(folder));
        for folder in folders {
            if !self.armed.contains(&folder) && watcher.watch(&folder, RecursiveMode::NonRecursive).is_ok() {
                self.armed.insert(folder);
            }
        }
        if self.armed.is_empty() {
            self.next_look = Instant::now() + LOOK_BLIND;
        }
    }

    /// Drops all watches: a watch on a removed folder is dead, without an event.
    fn disarm(&mut self) {
        if let Some(watcher) = &mut self.watcher {
            for folder in &self.armed {
                watcher.unwatch(folder).ok();
            }
        }
        self.armed.clear();
    }
}

/// The folders in which a change may change the target of a path: its own, those with links on the way, and the one at
/// the end, which is the path itself or contains the file. All are named without links, so that the folder behind a
/// link is another one once the link is changed.
fn folders(path: &Path) -> BTreeSet<PathBuf> {
    let mut links = BTreeSet::new();
    find_links(path, &mut links);
    let holders = links.iter().map(PathBuf::as_path).chain([path]).filter_map(Path::parent);
    let mut folders: BTreeSet<PathBuf> = holders.filter_map(|folder| folder.canonicalize().ok()).collect();
    if let Ok(end) = path.canonicalize() {
        folders.extend(if end.is_dir() { Some(end) } else { end.parent().map(Path::to_owned) });
    }
    folders
}

/// Adds all links on the way of a path.
fn find_links(path: &Path, links: &mut BTreeSet<PathBuf>) {
    for way in path.ancestors() {
        if let (Ok(target), Some(folder)) = (way.read_link(), way.parent())
            && links.insert(way.to_owned())
        {
            find_links(&folder.join(target), links);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    /// Far below the five seconds between looks, far above the delay of an event.
    const SOON: Duration = Duration::from_secs(2);

    async fn is_seen(watch: &mut PolicyWatch) -> bool {
        tokio::time::timeout(SOON, watch.changed()).await.is_ok()
    }

    #[tokio::test]
    async fn an_edited_a_replaced_and_a_new_file_are_seen() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("policy.yaml");
        fs::write(&file, "a").unwrap();
        let mut watch = PolicyWatch::new([file.clone()]);
        fs::write(&file, "b").unwrap();
        assert!(is_seen(&mut watch).await, "edited");
        for round in 0..3 {
            let other = folder.path().join("policy.yaml.new");
            fs::write(&other, "c").unwrap();
            fs::rename(&other, &file).unwrap();
            assert!(is_seen(&mut watch).await, "replaced {round}");
        }
        fs::remove_file(&file).unwrap();
        assert!(is_seen(&mut watch).await, "removed");
        fs::write(&file, "d").unwrap();
        assert!(is_seen(&mut watch).await, "back again");
    }

    #[tokio::test]
    async fn every_swap_of_a_config_map_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let mount = folder.path();
        let version = |n: u32| {
            let data = mount.join(format!("..{n}"));
            fs::create_dir(&data).unwrap();
            fs::write(data.join("policy.yaml"), n.to_string()).unwrap();
            symlink(format!("..{n}"), mount.join("..data_tmp")).unwrap();
            fs::rename(mount.join("..data_tmp"), mount.join("..data")).unwrap();
        };
        version(0);
        symlink("..data/policy.yaml", mount.join("policy.yaml")).unwrap();
        let mut of_file = PolicyWatch::new([mount.join("policy.yaml")]);
        let mut of_folder = PolicyWatch::new([mount.to_owned()]);
        for n in 1..4 {
            version(n);
            fs::remove_dir_all(mount.join(format!("..{}", n - 1))).unwrap();
            let (by_file, by_folder) = tokio::join!(is_seen(&mut of_file), is_seen(&mut of_folder));
            assert!(by_file && by_folder, "swap {n}");
            assert_eq!(fs::read_to_string(mount.join("policy.yaml")).unwrap(), n.to_string());
        }
    }

    #[tokio::test]
    async fn a_link_to_a_folder_that_leads_elsewhere_is_seen_and_what_changes_behind_it_too() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let lead = |link: &str, to: &str| {
            symlink(to, root.join("new")).unwrap();
            fs::rename(root.join("new"), root.join(link)).unwrap();
        };
        for version in ["first", "second"] {
            fs::create_dir_all(root.join(version).join("policy")).unwrap();
            fs::write(root.join(version).join("policy/policy.yaml"), version).unwrap();
        }
        lead("current", "first");
        fs::create_dir(root.join("etc")).unwrap();
        symlink("../current/policy", root.join("etc/hopguard")).unwrap();
        let mut of_file = PolicyWatch::new([root.join("etc/hopguard/policy.yaml")]);
        let mut of_folder = PolicyWatch::new([root.join("etc/hopguard")]);
        lead("current", "second");
        let (by_file, by_folder) = tokio::join!(is_seen(&mut of_file), is_seen(&mut of_folder));
        assert!(by_file && by_folder, "swapped: {by_file} {by_folder}");
        fs::write(root.join("second/policy/policy.yaml"), "third").unwrap();
        let (by_file, by_folder) = tokio::join!(is_seen(&mut of_file), is_seen(&mut of_folder));
        assert!(by_file && by_folder, "edited: {by_file} {by_folder}");
    }

    #[tokio::test]
    async fn a_folder_that_vanished_and_came_back_is_watched_again() {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("inner");
        let file = inner.join("policy.yaml");
        fs::create_dir(&inner).unwrap();
        fs::write(&file, "a").unwrap();
        let mut watch = PolicyWatch::new([file.clone()]);
        fs::remove_dir_all(&inner).unwrap();
        assert!(is_seen(&mut watch).await, "removed");
        fs::create_dir(&inner).unwrap();
        fs::write(&file, "b").unwrap();
        // Its events went with it, so this change may be seen only at the next look.
        assert!(tokio::time::timeout(LOOK * 2, watch.changed()).await.is_ok(), "back again");
        fs::write(&file, "c").unwrap();
        assert!(tokio::time::timeout(LOOK * 2, watch.changed()).await.is_ok(), "edited");
    }

    #[tokio::test]
    async fn an_event_outlives_a_call_that_was_dropped() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("policy.yaml");
        let mut watch = PolicyWatch::new([file.clone()]);
        fs::write(&file, "a").unwrap();
        tokio::time::timeout(Duration::from_millis(50), watch.changed()).await.ok();
        assert!(is_seen(&mut watch).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_is_still_being_written_is_not_looked_at_yet() {
        let between = Duration::from_millis(60);
        for (pieces, wanted) in [(1, SETTLE), (5, between * 4 + SETTLE), (100, SETTLE_MOST)] {
            let folder = tempfile::tempdir().unwrap();
            let mut watch = PolicyWatch::new([folder.path().join("policy.yaml")]);
            let event = Arc::clone(&watch.event);
            let begun = Instant::now();
            let writer = async {
                for _ in 0..pieces {
                    event.notify_one();
                    tokio::time::sleep(between).await;
                }
            };
            let looked = async {
                watch.changed().await;
                begun.elapsed()
            };
            let ((), looked) = tokio::join!(writer, looked);
            // The clock of the runtime counts milliseconds.
            assert!(looked >= wanted && looked <= wanted + between, "{pieces} pieces: {looked:?}");
        }
    }

    #[tokio::test]
    async fn reading_a_file_is_no_change() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("policy.yaml");
        fs::write(&file, "a").unwrap();
        let mut watch = PolicyWatch::new([file.clone()]);
        fs::read(&file).unwrap();
        fs::read_dir(folder.path()).unwrap().count();
        assert!(tokio::time::timeout(Duration::from_millis(300), watch.changed()).await.is_err());
    }
}
