//! The bound of HTTP/1 heads that both sides give to hyper.

/// The number of header fields up to which hyper parses a head, for a policy's `maxHeaderCount`.
///
/// A quarter more than allowed, so that most heads with too many fields are refused by hopguard, with the number and the
/// setting; hyper itself refuses what has more. hyper keeps up to 100 parsed fields on the stack and any more on the heap,
/// 64 bytes each.
pub fn parsed_headers(allowed: u32) -> usize {
    allowed.saturating_add(allowed / 4) as usize
}
