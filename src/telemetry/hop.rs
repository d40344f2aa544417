//! Hops: source, destination, route and direction of calls. A hop is registered when a policy is compiled and is a
//! small number from then on, so that the path of a request handles no labels.
//!
//! Ids are never reused: a counter that disappeared in a reload and returned later would read as a reset. The table is
//! bounded by [`MAX_HOPS`]; beyond the bound every new hop maps to the one whose labels are all `other`.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Most hops of one process, the one named `other` included.
pub const MAX_HOPS: usize = 16_384;

/// Direction of calls, seen from the service beside hopguard.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DirectionLabel {
    /// Calls to the service beside hopguard.
    Inbound,
    /// Calls that this service makes.
    Outbound,
    /// Of the overflow hop only.
    Other,
}

impl DirectionLabel {
    /// The label value.
    pub const fn as_str(self) -> &'static str {
        match self {
            DirectionLabel::Inbound => "inbound",
            DirectionLabel::Outbound => "outbound",
            DirectionLabel::Other => "other",
        }
    }
}

/// The labels that all metrics and log lines of a hop carry.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HopLabels {
    /// The service beside this process (`service` in the policy).
    pub source: Arc<str>,
    /// Name of the destination in the policy.
    pub destination: Arc<str>,
    /// Name of the route in the policy; never a path.
    pub route: Arc<str>,
    /// Direction of the calls.
    pub direction: DirectionLabel,
}

impl HopLabels {
    /// Labels from their four values.
    pub fn new(
        source: impl Into<Arc<str>>,
        destination: impl Into<Arc<str>>,
        route: impl Into<Arc<str>>,
        direction: DirectionLabel,
    ) -> Self {
        Self { source: source.into(), destination: destination.into(), route: route.into(), direction }
    }

    /// Labels for exchanges that end before their destination is known: destination and route are `none`.
    pub fn unrouted(source: impl Into<Arc<str>>, direction: DirectionLabel) -> Self {
        Self::new(source, "none", "none", direction)
    }
}

/// Number of a registered hop; valid for the life of the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HopId(u32);

impl HopId {
    /// The overflow hop, whose labels are all `other`.
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

/// All hops of the process. The lock is taken when a policy is compiled, when a worker uses a hop for the first time
/// and when metrics are read; never per exchange.
#[derive(Debug)]
pub struct Hops {
    table: Mutex<Table>,
    overflowed: AtomicU64,
}

impl Default for Hops {
    fn default() -> Self {
        let other = HopLabels::new("other", "other", "other", DirectionLabel::Other);
        Self {
            table: Mutex::new(Table { ids: HashMap::default(), labels: vec![Arc::new(other)] }),
            overflowed: AtomicU64::new(0),
        }
    }
}

impl Hops {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The id of these labels; equal labels have the same id, also after a reload. If the table is full, counts an
    /// overflow and returns [`HopId::OTHER`].
    pub fn register(&self, labels: HopLabels) -> HopId {
        let mut table = self.table();
        if let Some(id) = table.ids.get(&labels) {
            return *id;
        }
        let next = u32::try_from(table.labels.len()).unwrap_or(u32::MAX);
        if table.labels.len() >= MAX_HOPS {
            self.overflowed.fetch_add(1, Ordering::Relaxed);
            return HopId::OTHER;
        }
        let labels = Arc::new(labels);
        table.ids.insert(Arc::clone(&labels), HopId(next));
        table.labels.push(labels);
        HopId(next)
    }

    /// Labels of a hop.
    pub fn labels(&self, id: HopId) -> Arc<HopLabels> {
        let table = self.table();
        Arc::clone(table.labels.get(id.index()).unwrap_or(&table.labels[0]))
    }

    /// Registrations that found the table full.
    pub fn overflowed(&self) -> u64 {
        self.overflowed.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_labels_give_the_same_id_and_the_table_is_bounded() {
        let hops = Hops::default();
        let first = hops.register(HopLabels::new("order", "payment", "pay", DirectionLabel::Outbound));
        assert_ne!(first, HopId::OTHER);
        assert_eq!(first, hops.register(HopLabels::new("order", "payment", "pay", DirectionLabel::Outbound)));
        assert_ne!(first, hops.register(HopLabels::new("order", "payment", "pay", DirectionLabel::Inbound)));
        for route in 0..MAX_HOPS {
            hops.register(HopLabels::new("order", "payment", route.to_string(), DirectionLabel::Outbound));
        }
        assert_eq!(hops.overflowed(), 3, "two named hops and the overflow itself had been there");
        let late = hops.register(HopLabels::new("order", "late", "late", DirectionLabel::Outbound));
        assert_eq!(late, HopId::OTHER);
        assert_eq!(&*hops.labels(late).route, "other");
        assert_eq!(hops.register(HopLabels::new("order", "payment", "pay", DirectionLabel::Outbound)), first);
    }
}
