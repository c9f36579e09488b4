//! Whose functions a bus reset reaches, where they were opened by their own device files.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::function::reset::ResetOwner;
use crate::function::sys::{OwnedBy, Reached};

/// Whoever has the iommufd that a function is bound to. The kernel tells what is bound to it from what is not, and wants
/// no proof.
#[derive(Debug)]
pub(crate) struct OfThisIommufd;

impl ResetOwner for OfThisIommufd {
    fn owns(&self, reached: &Reached) -> bool {
        reached.owned_by == OwnedBy::Iommufd
    }

    fn proof(&self, _: &[Reached]) -> Vec<Arc<OwnedFd>> {
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::GroupId;

    #[test]
    fn f4_a_bus_reset_is_ours_where_the_kernel_says_that_all_are_of_the_iommufd() {
        let reached = |owned_by| Reached { bdf: "00:09.0".parse().expect("an address"), owned_by };
        assert!(OfThisIommufd.owns(&reached(OwnedBy::Iommufd)));
        assert!(!OfThisIommufd.owns(&reached(OwnedBy::Others)));
        assert!(!OfThisIommufd.owns(&reached(OwnedBy::Group(GroupId(3)))));
        assert!(OfThisIommufd.proof(&[reached(OwnedBy::Iommufd)]).is_empty());
    }
}
