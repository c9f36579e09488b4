//! A second processor, which does something over and over beside the test: for tests that ask for `--cpus 2`.
//!
//! It is started by INIT and a start-up message (xAPIC), and goes the way of the first one: through long mode into ring
//! 3, with stacks and a task state segment of its own, and the same interrupts and exceptions. A panic there fails the
//! test as it does here.

use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::ptr::null_mut;
use core::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, Ordering};

use crate::x86::{LOCAL_APIC, enable_interrupts, pause, read, wait_for, write};

/// Where the second processor starts in real mode: below 1 MiB, in a page that neither firmware nor the boot protocol
/// uses.
const TRAMPOLINE: u64 = 0x1_0000;
/// The local APIC's id of the second processor.
const ID: u32 = 1;
const COMMAND: u64 = LOCAL_APIC + 0x300;
const COMMAND_HIGH: u64 = LOCAL_APIC + 0x310;
/// INIT, asserted.
const INIT: u32 = 0x4500;
const START_UP: u32 = 0x4600;

global_asm!(
    r#"
.section .data
.align 16
second_gdt: .quad 0
     .quad 0x00af9b000000ffff
     .quad 0x00cf93000000ffff
     .quad 0x00affb000000ffff
     .quad 0x00cff3000000ffff
second_gdt_tss: .quad 0x0000890000002068
     .quad 0
     .quad 0x00cf9b000000ffff
second_gdt_end:

.section .bss
.align 16
second_tss: .skip 8448
second_kernel_stack: .skip 4096
second_kernel_stack_top: .skip 16
second_user_stack: .skip 65536
second_user_stack_top:

.section .boot, "ax"
.code16
.global second_start
second_start:
    cli
    movw %cs, %ax
    movw %ax, %ds
    movw $(second_gdt_pointer - second_start), %bx
    lgdtl (%bx)
    movl %cr0, %eax
    orl $1, %eax
    movl %eax, %cr0
    ljmpl $0x38, $second_protected
second_gdt_pointer: .word second_gdt_end - second_gdt - 1
     .long second_gdt
.global second_start_end
second_start_end:
.code32
second_protected:
    movw $0x10, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movl $0x620, %eax
    movl %eax, %cr4
    movl $boot_pml4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx
    rdmsr
    orl $0x100, %eax
    wrmsr
    movl $0x80000033, %eax
    movl %eax, %cr0
    ljmp $0x08, $2f
.code64
2:  leaq second_kernel_stack_top(%rip), %rsp
    leaq second_user_stack_top(%rip), %rcx
    subq $8, %rcx
    movq %rcx, (%rsp)
    lidt idt_pointer(%rip)
    leaq second_tss(%rip), %rax
    movq %rsp, 4(%rax)
    movw $104, 102(%rax)
    movb $0xff, 8296(%rax)
    leaq second_gdt_tss(%rip), %rdi
    movw %ax, 2(%rdi)
    shrq $16, %rax
    movb %al, 4(%rdi)
    movb %ah, 7(%rdi)
    movw $0x28, %ax
    ltr %ax
    pushq $0x23
    pushq %rcx
    pushq $0x202
    pushq $0x1b
    leaq second_main(%rip), %rax
    pushq %rax
    iretq
"#,
    options(att_syntax)
);

unsafe extern "C" {
    static second_start: u8;
    static second_start_end: u8;
}

/// It has not come up.
const OFF: u32 = 0;
/// It waits for something to do.
const IDLE: u32 = 1;
/// It does [`CALL`].
const AT_WORK: u32 = 2;

static STATE: AtomicU32 = AtomicU32::new(OFF);
/// What is done, a `fn(*mut ())`, and what it is given.
static CALL: AtomicPtr<()> = AtomicPtr::new(null_mut());
static GIVEN: AtomicPtr<()> = AtomicPtr::new(null_mut());
static ENOUGH: AtomicBool = AtomicBool::new(false);
static ROUNDS: AtomicU64 = AtomicU64::new(0);
static ITS_ID: AtomicU32 = AtomicU32::new(0);

/// What the second processor is doing.
pub struct Other(());

impl Other {
    /// Rounds that it has ended.
    pub fn rounds(&self) -> u64 {
        ROUNDS.load(Ordering::Acquire)
    }

    /// Waits for `count` whole rounds: that began after this call and have ended.
    pub fn wait_for_rounds(&self, count: u64) {
        // One may be under way.
        let enough = self.rounds() + 1 + count;
        wait_for("the rounds of the second processor", || self.rounds() >= enough);
    }

    /// The id of its local APIC, which takes interrupts.
    pub fn apic_id(&self) -> u8 {
        ITS_ID.load(Ordering::Relaxed) as u8
    }
}

/// Does `this` here while the second processor does `round` over and over, at least once. Gives what `this` gives, when
/// the other has ended, too. It may be used again and again.
pub fn beside<F: FnMut() + Send, R>(mut round: F, this: impl FnOnce(&Other) -> R) -> R {
    start();
    ROUNDS.store(0, Ordering::Relaxed);
    ENOUGH.store(false, Ordering::Relaxed);
    CALL.store(rounds::<F> as fn(*mut ()) as *mut (), Ordering::Relaxed);
    GIVEN.store((&raw mut round).cast(), Ordering::Relaxed);
    STATE.store(AT_WORK, Ordering::Release);
    let result = this(&Other(()));
    ENOUGH.store(true, Ordering::Release);
    wait_for("the end of what the second processor does", || STATE.load(Ordering::Acquire) == IDLE);
    result
}

fn rounds<F: FnMut()>(round: *mut ()) {
    // SAFETY: `beside` gives its own `F`, touches it no more, and does not return before this has: a panic ends the
    // machine.
    let round = unsafe { &mut *round.cast::<F>() };
    loop {
        round();
        ROUNDS.fetch_add(1, Ordering::Release);
        if ENOUGH.load(Ordering::Acquire) {
            return;
        }
    }
}

fn start() {
    if STATE.load(Ordering::Acquire) != OFF {
        return;
    }
    let (first, end) = (&raw const second_start as u64, &raw const second_start_end as u64);
    for at in first..end {
        write::<u8>(TRAMPOLINE + (at - first), read(at));
    }
    enable_interrupts();
    let send = |message: u32| {
        write::<u32>(COMMAND_HIGH, ID << 24);
        write::<u32>(COMMAND, message);
    };
    send(INIT);
    // What processors ask for between the two. Intel SDM, volume 3, "MP initialization protocol".
    pause(10);
    send(START_UP | (TRAMPOLINE >> 12) as u32);
    wait_for("the second processor (is it there? --cpus 2)", || STATE.load(Ordering::Acquire) == IDLE);
}

#[unsafe(no_mangle)]
extern "C" fn second_main() -> ! {
    ITS_ID.store(enable_interrupts().into(), Ordering::Relaxed);
    loop {
        STATE.store(IDLE, Ordering::Release);
        while STATE.load(Ordering::Acquire) != AT_WORK {
            core::hint::spin_loop();
        }
        // SAFETY: `beside` stored a function of this type before it said that there is work.
        let call = unsafe { core::mem::transmute::<*mut (), fn(*mut ())>(CALL.load(Ordering::Relaxed)) };
        call(GIVEN.load(Ordering::Relaxed));
    }
}

/// Something that both processors use, one at a time.
pub struct Lock<T> {
    held: AtomicBool,
    content: UnsafeCell<T>,
}

// SAFETY: the content is reached in `with` only, by one processor at a time.
unsafe impl<T: Send> Sync for Lock<T> {}

impl<T> Lock<T> {
    /// Nobody uses it yet.
    pub fn new(content: T) -> Self {
        Self { held: AtomicBool::new(false), content: UnsafeCell::new(content) }
    }

    /// Waits until the other does not use it, and uses it. Not to be called inside of itself.
    pub fn with<R>(&self, inside: impl FnOnce(&mut T) -> R) -> R {
        wait_for("a lock", || !self.held.swap(true, Ordering::Acquire));
        // SAFETY: it was not held, and is now: there is no other reference.
        let result = inside(unsafe { &mut *self.content.get() });
        self.held.store(false, Ordering::Release);
        result
    }
}
