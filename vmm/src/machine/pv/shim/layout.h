/*
 * Where everything is that the shim and the VMM share. The one source of these numbers:
 * build.rs turns every `#define NAME NUMBER` of this file into a Rust constant.
 *
 * The "area" is guest-physical memory behind the guest's RAM. The guest sees it in page map
 * level-4 slot 257; slot 258 maps all memory, area included, 1:1.
 */

/* Guest-virtual addresses. */
#define AREA_BASE 0xffff808000000000
#define DIRECT_BASE 0xffff810000000000
#define AREA_SLOT 257
#define DIRECT_SLOT 258

/*
 * Offsets in the area. Up to AREA_CODE_END it is one vCPU's: each has a copy of all that, AREA_STRIDE after
 * the one before, whose code finds its data by where it runs. What comes behind is in the first vCPU's alone.
 * Everything below AREA_SHARED_INFO is for CPL0 alone.
 */
#define AREA_STRIDE 0x40000
#define AREA_MOST_VCPUS 8
#define AREA_CPL0 0x0
#define AREA_IDT 0x1000
#define AREA_GDT 0x2000
#define AREA_TSS 0x3000
#define AREA_SHARED_INFO 0x5000
#define AREA_COMM 0x6000
#define AREA_SHIM 0x8000
#define AREA_SHIM_END 0x18000
/* Tops of one-page stacks: exceptions; page faults; entry to CPL0. */
#define AREA_EXCEPTION_STACK 0x1b000
#define AREA_FAULT_STACK 0x1d000
#define AREA_CPL0_STACK 0x1f000
/* Nothing in [0, AREA_CODE_END) of a copy is ever interrupted by an event. */
#define AREA_CODE_END 0x20000
/* Page tables of the two slots, then (at 2 MiB, after all copies) the machine-to-physical table. */
#define AREA_SLOT_L3 0x20000
#define AREA_SLOT_L2 0x21000
#define AREA_SLOT_L1 0x22000
#define AREA_DIRECT_L3 0x23000
#define AREA_DIRECT_L2 0x24000
#define AREA_M2P 0x200000

/* Fixed entry points, offsets in the area. */
#define CPL0_VECTORS 0x0
#define CPL0_BREAKPOINT 0x800
#define CPL0_SYSCALL 0x900
/* Two interrupt frames, whose addresses are those of the copy: to the breakpoint's handler, to the system call's. */
#define CPL0_BREAKPOINT_FRAME 0x940
#define CPL0_SYSCALL_FRAME 0x980
#define SHIM_SYSCALL 0x8000
#define SHIM_HYPERCALL 0x8010
#define SHIM_IRET 0x8020
#define SHIM_UPCALL 0x8030
#define SHIM_FAULT_BOUNCE 0x8040
#define SHIM_VECTORS 0x8100
#define SHIM_VECTOR_SIZE 32

/* Selectors. The guest's kernel and its processes both run at CPL3. */
#define CODE_CPL0 0x10
#define CODE_CPL3 0x33
#define DATA_CPL3 0x2b

/* Values of COMM_KERNEL_MODE that are not 0: the kernel runs; it serves a process's write to a read-only page. */
#define IN_KERNEL 1
#define IN_FAULT 3

/* The version of Xen's interface that is spoken: 4.17. */
#define XEN_INTERFACE 0x40011

/* Ports by which the shim calls the VMM. */
#define PORT_HYPERCALL 0xf0
/* A hypercall that no guest makes: the vCPUs of the set in rdi must invalidate what they have cached. */
#define FLUSH_VCPUS 0x100
#define PORT_INVALID_OPCODE 0xf1
#define PORT_PROTECTION 0xf2
#define PORT_VECTOR 0xf3
#define PORT_PANIC 0xf4

/* Byte offsets in the page shared by shim and VMM (struct comm). */
#define COMM_KERNEL_MODE 0x00
#define COMM_KERNEL_SP 0x08
#define COMM_USER_GS 0x10
#define COMM_KERNEL_GS 0x18
#define COMM_ON_SYSCALL 0x20
#define COMM_ON_EVENT 0x28
#define COMM_VCPU_INFO 0x30
#define COMM_SCRATCH 0x38
#define COMM_SCRATCH_RCX 0x40
#define COMM_RESUME_SP 0x48
#define COMM_RESUME_IP 0x50
#define COMM_CR3 0x58
#define COMM_AREA 0x60
#define COMM_PANIC 0x68
#define COMM_PENDING 0x90
#define COMM_BOOTED 0x98
#define COMM_COUNTERS 0xa0
#define COMM_COUNTERS_NUMBER 16
#define COMM_FIRST_AREA 0x120
#define COMM_VCPUS 0x128
#define COMM_VCPU 0x130
#define COMM_TRAPS 0x200

/* The doorbell port's byte in the TSS's I/O bitmap, and its four bits (see thaw-wire). */
#define DOORBELL_BYTE 0xf4
#define DOORBELL_BITS 0x0f
#define TSS_BITMAP 0x68
#define TSS_SIZE 0x15f
