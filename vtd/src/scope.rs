//! What an invalidation reaches. Sections 6.5.2 and 11.4.6.

use crate::config::MAX_ADDRESS_MASK;
use crate::ids::{DomainId, SourceId};
use crate::range::IovaRange;
use crate::spec::invalidation::granularity;

/// Which cached translations an invalidation reaches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scope {
    /// All.
    Everything,
    /// Those of one domain.
    Domain(DomainId),
    /// Those of one domain in a range of addresses.
    Pages(DomainId, IovaRange),
}

/// Which requesters a context-cache invalidation reaches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ContextScope {
    Everything,
    Domain(DomainId),
    /// A source id, and the function bits that are ignored in it.
    Device {
        source: SourceId,
        ignored: u16,
    },
}

/// The scope of a context-cache invalidation by descriptor or by register; `None` for the reserved granularity.
pub(crate) fn context_scope_of(given: u8, domain: u16, source: u16, function_mask: u8) -> Option<ContextScope> {
    match given {
        granularity::GLOBAL => Some(ContextScope::Everything),
        granularity::DOMAIN => Some(ContextScope::Domain(DomainId(domain))),
        granularity::SELECTIVE => {
            // 1 ignores bit 2 of the function number, 2 bits 2:1, 3 all of it. Section 6.5.2.1.
            let ignored = [0, 0b100, 0b110, 0b111][usize::from(function_mask & 3)];
            Some(ContextScope::Device { source: SourceId(source), ignored })
        }
        _ => None,
    }
}

/// The scope of an IOTLB invalidation by descriptor or by register; `None` for the reserved granularity and for an
/// address mask beyond MAMV.
pub(crate) fn iotlb_scope_of(given: u8, domain: u16, page: u64, address_mask: u8) -> Option<Scope> {
    let domain = DomainId(domain);
    match given {
        granularity::GLOBAL => Some(Scope::Everything),
        granularity::DOMAIN => Some(Scope::Domain(domain)),
        granularity::SELECTIVE if address_mask <= MAX_ADDRESS_MASK => {
            let size = 4096u64 << address_mask;
            let first = (page << 12) & !(size - 1);
            Some(Scope::Pages(domain, IovaRange::new(first, first + (size - 1))))
        }
        _ => None,
    }
}
