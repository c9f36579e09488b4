//! From the PVH entry point (32-bit protected mode, no paging, EBX at the start information) to Rust in ring 3, and the
//! way of every interrupt and exception. As little as possible runs in ring 0: see the crate's page.

use core::arch::global_asm;
use core::sync::atomic::{AtomicBool, Ordering};

global_asm!(
    r#"
.section .note.pvh, "a", @note
.align 4
    .long 4, 4, 18
    .asciz "Xen"
    .long start_pvh

// An identity map of 4 GiB in 2 MiB pages, for user mode too.
.section .data
.align 4096
.global boot_pml4
boot_pml4: .quad boot_pdpt + 7
    .fill 511, 8, 0
boot_pdpt: .quad boot_pd + 7, boot_pd + 0x1007, boot_pd + 0x2007, boot_pd + 0x3007
    .fill 508, 8, 0
boot_pd:
.set page, 0
.rept 2048
    .quad page + 0x87
.set page, page + 0x200000
.endr

.section .bss
.align 4096
idt:  .skip 4096
tss:  .skip 8448
.align 16
kernel_stack: .skip 16384
kernel_stack_top: .skip 16 // where an exception goes on, see `common`
user_stack: .skip 262144
user_stack_top:
.global IRQ_COUNT
IRQ_COUNT: .skip 2048
.global IRQ_REGISTER
IRQ_REGISTER: .skip 8
.global EXCEPTION
EXCEPTION: .skip 32

.section .boot, "ax"
.code32
.global start_pvh
start_pvh:
    cld
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
    lgdt gdt_pointer
    ljmp $0x08, $2f
.code64
2:  movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    leaq kernel_stack_top(%rip), %rsp
    leaq stubs(%rip), %rax
    leaq idt(%rip), %rdi
    movl $256, %ecx
3:  movw %ax, (%rdi)
    movw $0x08, 2(%rdi)
    movw $0x8e00, 4(%rdi)
    movq %rax, %rdx
    shrq $16, %rdx
    movw %dx, 6(%rdi)
    movl $0, 8(%rdi)
    addq $16, %rdi
    addq $16, %rax
    decl %ecx
    jnz 3b
    lidt idt_pointer(%rip)
    // Firmware may have left a timer running behind the old interrupt controllers, at vectors that are exceptions here.
    movb $0xff, %al
    outb %al, $0x21
    outb %al, $0xa1
    // The bitmap of ports is all zeros: user mode may use every port.
    leaq tss(%rip), %rax
    leaq kernel_stack_top(%rip), %rdx
    movq %rdx, 4(%rax)
    movw $104, 102(%rax)
    movb $0xff, 8296(%rax)
    leaq user_stack_top(%rip), %rcx
    subq $8, %rcx
    movq %rcx, (%rdx)
    leaq gdt_tss(%rip), %rdi
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
    leaq rust_main(%rip), %rax
    pushq %rax
    movl %ebx, %edi
    iretq

.align 16
stubs:
.set vector, 0
.rept 256
.align 16
  .if !((vector == 8) || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21)
    pushq $0
  .endif
    pushq $vector
    jmp common
.set vector, vector + 1
.endr
.align 16
common:
    pushq %rax
    pushq %rcx
    movq 16(%rsp), %rax
    cmpl $2, %eax
    je nmi
    cmpl $32, %eax
    jb exception
    leaq IRQ_COUNT(%rip), %rcx
    lock incq (%rcx,%rax,8)
    movq IRQ_REGISTER(%rip), %rcx
    jrcxz 5f
    movl $0xffffffff, (%rcx)
5:
    // End of interrupt, at the local APIC.
    movl $0xfee000b0, %ecx
    movl $0, (%rcx)
    popq %rcx
    popq %rax
    addq $16, %rsp
    iretq
nmi:
    // Counted like an interrupt; it has no end to be told.
    leaq IRQ_COUNT(%rip), %rcx
    lock incq 16(%rcx)
    popq %rcx
    popq %rax
    addq $16, %rsp
    iretq
exception:
    // Goes on in user mode, where it can be told.
    leaq EXCEPTION(%rip), %rcx
    movq %rax, (%rcx)
    movq 24(%rsp), %rax
    movq %rax, 8(%rcx)
    movq 32(%rsp), %rax
    movq %rax, 16(%rcx)
    movq %cr2, %rax
    movq %rax, 24(%rcx)
    leaq rust_exception(%rip), %rax
    movq %rax, 32(%rsp)
    // Above the frame: the stack of this processor, from its top.
    movq 72(%rsp), %rax
    movq %rax, 56(%rsp)
    popq %rcx
    popq %rax
    addq $16, %rsp
    iretq
.align 8
gdt: .quad 0
     .quad 0x00af9b000000ffff
     .quad 0x00cf93000000ffff
     .quad 0x00affb000000ffff
     .quad 0x00cff3000000ffff
gdt_tss: .quad 0x0000890000002068
     .quad 0
gdt_pointer: .word gdt_pointer - gdt - 1
      .long gdt
.global idt_pointer
idt_pointer: .word 4095
      .quad idt
"#,
    options(att_syntax)
);

unsafe extern "C" {
    static EXCEPTION: [u64; 4];
}

#[unsafe(no_mangle)]
extern "C" fn rust_exception() -> ! {
    // SAFETY: the assembly above wrote it before it came here. A second processor that does the same only blurs the
    // message of a test that has failed.
    let [vector, error, rip, address] = unsafe { (&raw const EXCEPTION).read_volatile() };
    panic!("exception {vector} (error {error:#x}) at {rip:#x}, address {address:#x}");
}

#[panic_handler]
fn panicked(info: &core::panic::PanicInfo<'_>) -> ! {
    // Of two processors one is quoted.
    if PANICKED.swap(true, Ordering::Relaxed) {
        loop {
            core::hint::spin_loop();
        }
    }
    crate::harness::failed(info)
}

static PANICKED: AtomicBool = AtomicBool::new(false);

// The prebuilt core unwinds and refers to it; with `panic = "abort"` nothing calls it.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
