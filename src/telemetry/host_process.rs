//! Figures of this process, read from `/proc/self` on request.

use std::time::Duration;

/// Ticks per second of the times in `/proc`: a constant of the Linux ABI, independent of the kernel's own tick rate.
const TICKS: u64 = 100;

/// Figures of this process; a figure is `None` if the system does not provide it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ProcessFigures {
    /// Resident memory in bytes.
    pub resident: Option<u64>,
    /// User and system CPU time since the start.
    pub cpu: Option<Duration>,
    /// Open file descriptors.
    pub open_files: Option<u64>,
    /// Start of the process, in seconds since 1970.
    pub started: Option<f64>,
}

impl ProcessFigures {
    /// Reads the current figures.
    pub fn read() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).ok();
        let stat = read("/proc/self/stat");
        let boot = read("/proc/stat").and_then(|text| field(&text, "btime"));
        let start = stat.as_deref().and_then(|stat| stat_field(stat, 22));
        Self {
            resident: read("/proc/self/status").and_then(|text| field(&text, "VmRSS:")).map(|kib| kib * 1024),
            cpu: stat.as_deref().and_then(cpu),
            // The directory listing itself holds one descriptor.
            open_files: std::fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count().saturating_sub(1) as u64),
            started: boot.zip(start).map(|(boot, ticks)| boot as f64 + ticks as f64 / TICKS as f64),
        }
    }
}

fn cpu(stat: &str) -> Option<Duration> {
    let ticks = stat_field(stat, 14)? + stat_field(stat, 15)?;
    Some(Duration::from_millis(ticks * 1000 / TICKS))
}

/// The number after `name` at the start of a line.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

/// Field `number` of `/proc/self/stat`, counted from 1 as in proc(5). The second field, the program's name, may contain
/// any character, so counting starts after the last parenthesis.
fn stat_field(stat: &str, number: usize) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_ascii_whitespace().nth(number.checked_sub(3)?)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let stat = "7 (a) (b) c) S 1 7 7 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 3 0 12345 1 2";
        assert_eq!(cpu(stat), Some(Duration::from_secs(3)));
        assert_eq!(stat_field(stat, 22), Some(12345));
        assert_eq!(cpu("nonsense"), None);
    }

    #[test]
    fn this_process_has_figures() {
        let figures = ProcessFigures::read();
        assert!(figures.resident.is_some_and(|bytes| bytes > 100_000), "{figures:?}");
        assert!(figures.cpu.is_some() && figures.open_files.is_some_and(|files| files >= 3), "{figures:?}");
        assert!(figures.started.is_some_and(|at| at > 1_600_000_000.0), "{figures:?}");
    }
}
