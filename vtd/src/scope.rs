//! What an invalidation reaches. Sections 6.5.2 and 11.4.6.

use crate::config::MAX_ADDRESS_MASK;
use crate::ids::{DomainId, Pasid, SourceId};
use crate::range::IovaRange;
use crate::spec::invalidation::{granularity, pasid_cache, pasid_iotlb};

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
    /// By a PASID-cache invalidation: all of a domain, and those that have none because no entry is present for them.
    Pasids {
        domain: DomainId,
        /// Only this one of the domain.
        pasid: Option<Pasid>,
    },
    /// A source id, and the function bits that are ignored in it.
    Device {
        source: SourceId,
        ignored: u16,
    },
}

impl ContextScope {
    /// Whether it names what a guest attaches a function with: the function, or the PASID of its requests.
    pub(crate) fn names_a_function(self) -> bool {
        matches!(self, Self::Device { .. } | Self::Pasids { pasid: Some(_), .. })
    }
}

/// The scope of a context-cache invalidation by descriptor or by register; `None` for the reserved granularity. In
/// scalable mode, where context entries have no domain, that of a domain is one of everything (section 6.5.2.1).
pub(crate) fn context_scope_of(
    given: u8,
    domain: u16,
    source: u16,
    function_mask: u8,
    scalable: bool,
) -> Option<ContextScope> {
    match given {
        granularity::DOMAIN if scalable => Some(ContextScope::Everything),
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

/// The scope of a PASID-cache invalidation; `None` for the reserved granularity.
pub(crate) fn pasid_scope_of(given: u8, domain: u16, pasid: u32) -> Option<ContextScope> {
    let domain = DomainId(domain);
    match given {
        pasid_cache::GLOBAL => Some(ContextScope::Everything),
        pasid_cache::DOMAIN => Some(ContextScope::Pasids { domain, pasid: None }),
        pasid_cache::PASID => Some(ContextScope::Pasids { domain, pasid: Some(Pasid(pasid)) }),
        _ => None,
    }
}

/// The scope of a PASID-based IOTLB invalidation, of the PASID that it names; `None` for a reserved granularity.
/// Address masks have no bound other than the address space.
pub(crate) fn pasid_iotlb_scope_of(given: u8, domain: u16, page: u64, address_mask: u8) -> Option<Scope> {
    let domain = DomainId(domain);
    match given {
        pasid_iotlb::PASID => Some(Scope::Domain(domain)),
        pasid_iotlb::PAGES => {
            let pages = 1u64.checked_shl(address_mask.into()).filter(|pages| *pages <= 1 << 51);
            Some(pages.map_or(Scope::Domain(domain), |pages| {
                let first = (page & !(pages - 1)) << 12;
                Scope::Pages(domain, IovaRange::new(first, first + ((pages << 12) - 1)))
            }))
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
