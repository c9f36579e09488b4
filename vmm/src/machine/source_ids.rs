//! Tells the unit which source ids functions behind bridges have.

use std::sync::Arc;

use devices::host::SourceIds;
use vtd::{Requester, SourceId, Unit};

use crate::kvm::memory::Ram;

struct UnitIds(Arc<Unit<Ram>>);

/// Tells `unit` of ids.
pub(super) fn ids_of(unit: &Arc<Unit<Ram>>) -> Arc<dyn SourceIds> {
    Arc::new(UnitIds(unit.clone()))
}

impl SourceIds for UnitIds {
    fn renumbered(&self, name: Requester, id: Option<SourceId>) {
        self.0.renumber(&[(name, id)]);
    }
}
