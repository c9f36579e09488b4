//! A group is a set of devices: all of them are attached, each by what the IOMMU sees of it, or none is (C-1, C-2).

use std::collections::BTreeSet;
use std::io;

use super::{HostDevice, HostSpaceId, HostStream};

/// The devices of a host, for a backend that attaches them one by one.
pub trait Devices {
    /// What the IOMMU sees of the requests of `device`, a member of a group. That is the device itself. Of a mediated
    /// device it is the one that makes the requests for it: a part of that, if it can be attached in parts, else all of
    /// it. Members of one group need not be seen as the same device, nor as different ones.
    fn seen(&self, device: HostDevice) -> HostStream;

    /// The requests of `stream` reach what `space` has, whatever they reached before.
    ///
    /// # Errors
    /// They are where they were.
    fn attach(&self, stream: HostStream, space: HostSpaceId) -> io::Result<()>;

    /// The requests of `stream` reach nothing.
    ///
    /// # Errors
    /// Nothing may be concluded about what they reach.
    fn detach(&self, stream: HostStream) -> io::Result<()>;
}

/// What the IOMMU sees of `members`: each once, also where several of them are seen as one.
pub fn seen(devices: &dyn Devices, members: &[HostDevice]) -> BTreeSet<HostStream> {
    members.iter().map(|member| devices.seen(*member)).collect()
}

/// Attaches all of `members`, which are in `from`, to `to`.
///
/// # Errors
/// One of them could not be. Those that were are back where they were, as far as the host could do it.
pub fn attach(
    devices: &dyn Devices,
    members: &[HostDevice],
    from: Option<HostSpaceId>,
    to: HostSpaceId,
) -> io::Result<()> {
    let streams = seen(devices, members);
    if streams.is_empty() {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    let mut moved = Vec::with_capacity(streams.len());
    for stream in streams {
        let Err(e) = devices.attach(stream, to) else {
            moved.push(stream);
            continue;
        };
        for moved in moved.into_iter().rev() {
            let back = match from {
                Some(from) => devices.attach(moved, from),
                None => devices.detach(moved),
            };
            if let Err(again) = back {
                log::error!("{moved} is not back where it was before {stream} could not be attached: {again}");
            }
        }
        return Err(e);
    }
    Ok(())
}

/// Detaches all of `members`, also after one of them could not be.
///
/// # Errors
/// The first of them; nothing may be concluded about what the group reaches.
pub fn detach(devices: &dyn Devices, members: &[HostDevice]) -> io::Result<()> {
    let detached: Vec<_> = seen(devices, members).into_iter().map(|stream| devices.detach(stream)).collect();
    detached.into_iter().collect()
}

#[cfg(test)]
#[path = "members_test.rs"]
mod members_test;
