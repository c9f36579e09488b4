//! What there is of KVM: the virtual machine with its memory and slots, its vCPUs, its interrupts.

pub mod cpuid;
pub mod doorbells;
pub mod irq;
pub mod memory;
pub mod register_page;
pub mod slots;
pub mod tail_bells;
pub mod vcpu;
pub mod vcpu_state;
pub mod vm;
