//! Hops: who calls whom on which route. A hop is registered when a policy is compiled and is a small number afterwards,
//! so that the request path never handles a label.
//!
//! Ids are never given back: a counter that vanished with a reload would come back as a reset. What bounds the table is
//! [`MAX_HOPS`]; beyond it every new hop is the one whose labels are all `other`.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How many different hops a process keeps apart.
pub const MAX_HOPS: usize = 16_384;

/// Which way the calls of a hop go, seen from our service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// Towards the service that we stand in front of.
    Inbound,
    /// Away from it.
    Outbound,
    /// Only of the overflow hop.
    Other,
}

impl Direction {
    /// The label value.
    pub const fn as_str(self) -> &'static str {
        match self {
            Direction::Inbound => "inbound",
            Direction::Outbound => "outbound",
            Direction::Other => "other",
        }
    }
}

/// The labels that all metrics and log lines of a hop carry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HopLabels {
    /// The service that this process stands beside.
    pub source: Arc<str>,
    /// The destination's name in the policy.
    pub destination: Arc<str>,
    /// The route's name in the policy; never a path.
    pub route: Arc<str>,
    /// Which way the calls go.
    pub direction: Direction,
}

impl HopLabels {
    /// From their four values.
    pub fn new(
        source: impl Into<Arc<str>>,
        destination: impl Into<Arc<str>>,
        route: impl Into<Arc<str>>,
        direction: Direction,
    ) -> Self {
        Self { source: source.into(), destination: destination.into(), route: route.into(), direction }
    }

    /// For exchanges that end before a destination is known: destination and route are `none`.
    pub fn unrouted(source: impl Into<Arc<str>>, direction: Direction) -> Self {
        Self::new(source, "none", "none", direction)
    }
}

/// The number of a registered hop; valid for the life of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HopId(u32);

impl HopId {
    /// The hop whose labels are all `other`.
    pub const OTHER: HopId = HopId(0);

    pub(super) const fn index(self) -> usize {
        self.0 as usize
    }
}

#[derive(Debug)]
struct Table {
    ids: HashMap<Arc<HopLabels>, HopId, foldhash::fast::RandomState>,
    labels: Vec<Arc<HopLabels>>,
}

/// All hops of the process. Locked when a policy is compiled, when a worker meets a hop for the first time, and when
/// somebody reads the metrics; never per exchange.
#[derive(Debug)]
pub struct Hops {
    table: Mutex<Table>,
    turned_away: AtomicU64,
}

impl Default for Hops {
    fn default() -> Self {
        let other = HopLabels::new("other", "other", "other", Direction::Other);
        Self {
            table: Mutex::new(Table { ids: HashMap::default(), labels: vec![Arc::new(other)] }),
            turned_away: AtomicU64::new(0),
        }
    }
}

impl Hops {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The id of these labels: the same one for the same labels, also after a reload. [`HopId::OTHER`] when the table is
    /// full, which is counted.
    pub fn register(&self, labels: HopLabels) -> HopId {
        let mut table = self.table();
        if let Some(id) = table.ids.get(&labels) {
            return *id;
        }
        let next = u32::try_from(table.labels.len()).unwrap_or(u32::MAX);
        if table.labels.len() >= MAX_HOPS {
            self.turned_away.fetch_add(1, Ordering::Relaxed);
            return HopId::OTHER;
        }
        let labels = Arc::new(labels);
        table.ids.insert(Arc::clone(&labels), HopId(next));
        table.labels.push(labels);
        HopId(next)
    }

    /// The labels of a hop.
    pub fn labels(&self, id: HopId) -> Arc<HopLabels> {
        let table = self.table();
        Arc::clone(table.labels.get(id.index()).unwrap_or(&table.labels[0]))
    }

    /// How often a hop was turned away because the table was full.
    pub fn turned_away(&self) -> u64 {
        self.turned_away.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_labels_give_the_same_id_and_the_table_is_bounded() {
        let hops = Hops::default();
        let first = hops.register(HopLabels::new("order", "payment", "pay", Direction::Outbound));
        assert_ne!(first, HopId::OTHER);
        assert_eq!(first, hops.register(HopLabels::new("order", "payment", "pay", Direction::Outbound)));
        assert_ne!(first, hops.register(HopLabels::new("order", "payment", "pay", Direction::Inbound)));
        for route in 0..MAX_HOPS {
            hops.register(HopLabels::new("order", "payment", route.to_string(), Direction::Outbound));
        }
        assert_eq!(hops.turned_away(), 3, "two named hops and the overflow itself had been there");
        let late = hops.register(HopLabels::new("order", "late", "late", Direction::Outbound));
        assert_eq!(late, HopId::OTHER);
        assert_eq!(&*hops.labels(late).route, "other");
        assert_eq!(hops.register(HopLabels::new("order", "payment", "pay", Direction::Outbound)), first);
    }
}
