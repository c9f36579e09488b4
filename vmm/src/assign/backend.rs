//! By which of the host's interfaces each function's memory is mapped.
//!
//! type1 pins all RAM once for each host group, and changes a group's container mapping by mapping; a single map or unmap
//! costs less there. iommufd pins RAM once for all, and switches a group between spaces in one step. So a guest with one
//! group is given type1, and one with several iommufd, unless the host has only one of both, or the user says which
//! (docs/running.md has the figures).

use std::collections::BTreeMap;

use vfio_bridge::{Bdf, CheckedFunction, GroupId, OpenError};

use super::Error;
use crate::config::Backend;

/// A function of the host, and whether each interface can have it.
pub struct Candidate {
    /// Which.
    pub bdf: Bdf,
    /// What the user wants.
    pub asked: Option<Backend>,
    /// By type1.
    pub type1: Result<CheckedFunction, OpenError>,
    /// By iommufd.
    pub iommufd: Result<CheckedFunction, OpenError>,
}

/// A function with the interface that it is assigned by, and why it is that one.
#[derive(Debug)]
pub struct Chosen {
    /// Which.
    pub function: CheckedFunction,
    /// By what.
    pub backend: Backend,
    /// Why, for the user.
    pub why: &'static str,
}

impl Candidate {
    fn by(&self, backend: Backend) -> &Result<CheckedFunction, OpenError> {
        match backend {
            Backend::Type1 => &self.type1,
            Backend::Iommufd => &self.iommufd,
        }
    }

    fn group(&self) -> Option<GroupId> {
        let checked = self.type1.as_ref().ok().or(self.iommufd.as_ref().ok());
        checked.map(CheckedFunction::group)
    }

    fn take(self, backend: Backend, why: &'static str) -> Result<Chosen, Error> {
        let function = match backend {
            Backend::Type1 => self.type1,
            Backend::Iommufd => self.iommufd,
        }?;
        Ok(Chosen { function, backend, why })
    }
}

/// Chooses for each, in their order. All functions of a group are assigned by one interface: the kernel gives a group to
/// one.
pub fn choose(candidates: Vec<Candidate>) -> Result<Vec<Chosen>, Error> {
    let mut fixed: BTreeMap<GroupId, Backend> = BTreeMap::new();
    for candidate in &candidates {
        if let (Some(backend), Some(group)) = (candidate.asked, candidate.group())
            && *fixed.entry(group).or_insert(backend) != backend
        {
            return Err(Error::TwoBackends { bdf: candidate.bdf, group });
        }
    }
    let can = |group: GroupId, backend: Backend| {
        candidates.iter().filter(|other| other.group() == Some(group)).all(|other| other.by(backend).is_ok())
    };
    let groups: std::collections::BTreeSet<GroupId> = candidates.iter().filter_map(Candidate::group).collect();
    let shared = groups.iter().filter(|group| match fixed.get(group) {
        Some(backend) => *backend == Backend::Iommufd,
        None => can(**group, Backend::Iommufd),
    });
    let shared = shared.count();
    let decide = |group: GroupId| match (can(group, Backend::Type1), can(group, Backend::Iommufd)) {
        (true, true) if shared >= 2 => (Backend::Iommufd, "memory is pinned once for several host groups"),
        (true, true) => (Backend::Type1, "for one host group its maps cost less"),
        (false, true) => (Backend::Iommufd, "the host has no type1 for it"),
        (_, false) => (Backend::Type1, "the host has no iommufd for it"),
    };
    let decided: BTreeMap<GroupId, (Backend, &'static str)> = groups
        .iter()
        .map(|group| (*group, fixed.get(group).map_or_else(|| decide(*group), |backend| (*backend, "as asked for"))))
        .collect();
    let of = |candidate: &Candidate| match candidate.group().and_then(|group| decided.get(&group)) {
        Some(decided) => *decided,
        // By neither: its refusal is said.
        None => (candidate.asked.unwrap_or(Backend::Type1), ""),
    };
    let decided: Vec<_> = candidates.iter().map(of).collect();
    candidates.into_iter().zip(decided).map(|(candidate, (backend, why))| candidate.take(backend, why)).collect()
}

#[cfg(test)]
#[path = "backend_test.rs"]
mod backend_test;
