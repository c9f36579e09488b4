//! The bridge over the model of a host: behaviours B-3 to B-15, C-1 to C-4, D-1 to D-5 and E-1 to E-4, and the
//! properties of design rules 3 and 4.

mod audit;
mod behaviours;
mod boot;
mod boot_saved;
mod broken;
mod dirty;
mod dirty_property;
mod faulty;
mod groups;
mod mappings;
mod nvme_boot;
mod parts;
mod peers;
mod per_space;
mod pins;
mod pins_property;
mod placement;
mod property;
mod refusals;
mod refused_joins;
mod scenario;
mod steps;
mod switches;
mod trace;
mod with_unit;
mod world;
