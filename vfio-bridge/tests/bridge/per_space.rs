//! A host that attaches groups to spaces, as iommufd does: identity stays, and what becomes of a group that got lost on its
//! way.

use std::io;
use std::sync::Arc;

use vfio_bridge::model::{HostOp, Kernel, Model, Served};
use vfio_bridge::{
    Bridge, GroupId, GuestMap, HostIommu, HostMem, HostSpaceId, Limits, MapRefused, Placement, Region, UnmapRange,
};
use vtd::{Perm, SpaceKey, SpaceListener};

use crate::world::*;

const RAM: Ram = Ram { low: 16 << 20, high: 16 << 20 };
const DEVICE: u64 = 0xc000_0000;

/// A machine's memory, and a page at [`DEVICE`] in it.
fn with_device() -> GuestMap {
    // SAFETY: the model never uses the address.
    let device = unsafe { Region::ram(DEVICE, KIB4, 1 << 40, None) }.expect("a page");
    GuestMap::new(RAM.regions().into_iter().chain([device]).collect()).expect("they do not overlap")
}

#[test]
fn b12_translation_that_is_turned_off_is_one_attach() {
    let world = World::per_space(Kernel::new(48), RAM, &[(1, 1)]);
    let space = paged(1, 48);
    world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
    let ram = world.contents();
    for round in 0..2 {
        world.attach(1, &space, &[mapping(0, KIB4, KIB4)]).expect("attached");
        assert_eq!((world.contents().len(), world.model.spaces()), (1, 2), "identity stays");
        world.model.served();
        if round == 1 {
            // It follows the guest-physical map while nobody is in it, too.
            world.bridge.replace_guest_map(with_device());
            assert!(matches!(world.model.served()[..], [Served { op: HostOp::Map(_), result: Ok(_), .. }]));
        }
        world.attach(1, &SpaceKey::Identity, &[]).expect("attached");
        let first = world.model.served()[0];
        assert!(matches!(first.op, HostOp::Attach(_)), "{first:?}");
    }
    assert_eq!(world.model.translate(GroupId(1), DEVICE), Some((1 << 40, Perm::ReadWrite)));
    world.bridge.replace_guest_map(RAM.map());
    assert_eq!((world.contents(), world.model.spaces()), (ram, 1));
}

/// A host whose attach fails half-way and cannot be undone.
struct HalfWay(Arc<Model>);

impl HostIommu for HalfWay {
    fn name(&self) -> &'static str {
        self.0.name()
    }
    fn placement(&self, group: GroupId) -> Option<Placement> {
        self.0.placement(group)
    }
    fn limits(&self, space: HostSpaceId) -> Limits {
        self.0.limits(space)
    }
    fn create(&self) -> io::Result<HostSpaceId> {
        self.0.create()
    }
    fn destroy(&self, space: HostSpaceId) {
        self.0.destroy(space);
    }
    fn attach(&self, group: GroupId, space: HostSpaceId) -> io::Result<()> {
        if group == GroupId(2) {
            return Err(io::ErrorKind::Other.into());
        }
        self.0.attach(group, space)
    }
    fn detach(&self, group: GroupId) -> io::Result<()> {
        if group == GroupId(2) {
            return Err(io::Error::other("nobody knows"));
        }
        self.0.detach(group)
    }
    fn map(&self, space: HostSpaceId, iova: u64, mem: HostMem<'_>, perm: Perm) -> Result<(), MapRefused> {
        self.0.map(space, iova, mem, perm)
    }
    fn unmap(&self, space: HostSpaceId, range: UnmapRange) -> io::Result<u64> {
        self.0.unmap(space, range)
    }
}

#[test]
fn c2_functions_of_a_group_that_is_nobody_knows_where_are_stopped_and_no_others() {
    let model = Model::per_space(Kernel::new(48), &[GroupId(1), GroupId(2)]);
    let stopped = Arc::new(Stopped::default());
    let bridge = Bridge::new(vec![Arc::new(HalfWay(model.clone()))], RAM.map(), stopped.clone());
    let space = paged(1, 48);
    for device in [1, 2] {
        bridge.register(requester(device), GroupId(device.into())).expect("new");
        let mut live = [mapping(0, 0, KIB4)].into_iter();
        assert_eq!(bridge.attach(requester(device).into(), &space, &mut live).is_ok(), device == 1);
    }
    assert_eq!(*stopped.functions.lock().expect("whole"), [requester(2)]);
    assert_eq!((bridge.space_of(requester(1)), bridge.space_of(requester(2))), (Some(space), Some(SpaceKey::Blocked)));
    assert_eq!(model.contents(GroupId(1)).len(), 1);
    // It stays stopped, whatever it is attached to.
    let again = bridge.attach(requester(2).into(), &SpaceKey::Identity, &mut std::iter::empty());
    assert!(again.is_err_and(|refused| refused.to_string().contains("nobody knows")));
}
