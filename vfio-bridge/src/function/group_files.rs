//! The files of the groups that this process has opened: by them the kernel knows whose functions a bus reset reaches,
//! where they were opened through their groups.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vfio_ioctls::VfioContainer;

use crate::function::check::HostPaths;
use crate::function::reset::ResetOwner;
use crate::function::sys::{OwnedBy, Reached};
use crate::host::GroupId;

/// The files, by group.
#[derive(Debug, Default)]
pub(crate) struct GroupFiles(Mutex<BTreeMap<GroupId, Arc<OwnedFd>>>);

impl GroupFiles {
    /// `group` is open, in `container`. Without its file no bus with a function of it can be reset.
    pub fn add(&self, group: GroupId, container: &VfioContainer) {
        let node = HostPaths::default().dev_vfio.join(group.to_string());
        match open_file_of(&node, container) {
            Ok(file) => {
                self.lock().insert(group, Arc::new(file));
            }
            Err(e) => log::debug!("the file of group {group} was not found, so no bus of it can be reset: {e}"),
        }
    }

    /// `group` is closed.
    pub fn remove(&self, group: GroupId) {
        self.lock().remove(&group);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<GroupId, Arc<OwnedFd>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ResetOwner for GroupFiles {
    fn owns(&self, reached: &Reached) -> bool {
        group_of(reached).is_some_and(|group| self.lock().contains_key(&group))
    }

    fn proof(&self, reached: &[Reached]) -> Vec<Arc<OwnedFd>> {
        let groups: BTreeSet<GroupId> = reached.iter().filter_map(group_of).collect();
        let files = self.lock();
        groups.iter().filter_map(|group| files.get(group).cloned()).collect()
    }
}

fn group_of(reached: &Reached) -> Option<GroupId> {
    match reached.owned_by {
        OwnedBy::Group(group) => Some(group),
        OwnedBy::Iommufd | OwnedBy::Others => None,
    }
}

/// A duplicate of the file that this process opened `node` as. A group can be opened once only, and vfio-ioctls keeps
/// its file to itself; `_owner` is what keeps that file open meanwhile.
fn open_file_of<T>(node: &Path, _owner: &T) -> io::Result<OwnedFd> {
    let device = fs::metadata(node)?.rdev();
    for entry in fs::read_dir("/proc/self/fd")? {
        let path = entry?.path();
        let Some(number) = path.file_name().and_then(|name| name.to_str()?.parse::<RawFd>().ok()) else { continue };
        // The folder's own file is among them, and others may be closed meanwhile.
        let Ok(metadata) = fs::metadata(&path) else { continue };
        if metadata.file_type().is_char_device() && metadata.rdev() == device {
            // SAFETY: the file of that number is open: it is a file of the device, and `_owner` holds the only one.
            let file = unsafe { BorrowedFd::borrow_raw(number) };
            return file.try_clone_to_owned();
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

#[cfg(test)]
#[path = "group_files_test.rs"]
mod group_files_test;
