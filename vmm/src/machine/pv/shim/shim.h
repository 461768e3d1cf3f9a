/* What the shim's C files share. Freestanding: no library, no stack beyond the caller's. */
#ifndef SHIM_H
#define SHIM_H

#include "layout.h"

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;

#define PAGE_SIZE 4096ul
#define PTE_PRESENT 0x1ul
#define PTE_WRITE 0x2ul
#define PTE_USER 0x4ul
#define PTE_DIRTY 0x40ul
#define PTE_ACCESSED_DIRTY 0x60ul
#define PTE_LARGE 0x80ul
#define PTE_FRAME 0x000ffffffffff000ul
#define PTE_NO_EXECUTE (1ul << 63)

/* Bits of a page fault's error code. */
#define ERROR_PRESENT 1ul
#define ERROR_WRITE 2ul
#define ERROR_USER 4ul
#define ERROR_FETCH 16ul

#define EINVAL 22
#define ENOENT 2
#define ENOSYS 38

enum counter {
	COUNT_FAULTS,
	COUNT_KERNEL_FAULTS,
	COUNT_DECODED,
	COUNT_CR2_READS,
	COUNT_EXCEPTIONS,
	COUNT_UPCALLS,
	COUNT_PTE_WRITES,
	COUNT_VA_WRITES,
	COUNT_CR3_LOADS,
	COUNT_FLUSHES,
	COUNT_INVLPGS,
	COUNT_MULTICALLS,
	COUNT_FORWARDED,
	COUNT_PINS,
	COUNT_TOUCHES,
};

struct trap {
	u64 address; /* 0: none */
	u64 masks;   /* events are masked on entry */
};

/* One page per vCPU; the VMM reads and writes it while the guest is stopped. */
struct comm {
	u64 kernel_mode; /* IN_KERNEL or IN_FAULT while the guest's kernel runs, else 0 */
	u64 kernel_sp;
	u64 user_gs;
	u64 kernel_gs;
	u64 on_syscall;
	u64 on_event;
	u64 vcpu_info; /* address in the direct map */
	u64 scratch;
	u64 scratch_rcx;
	u64 resume_sp;
	u64 resume_ip;
	u64 cr3;
	u64 area;   /* guest-physical address of this vCPU's copy of the area */
	u64 panic[5];
	u64 pending; /* a user page whose invalidation is put off (its address | 1), or 0 */
	u64 booted; /* the boot page table has been made readable for CPL3 */
	u64 counters[COMM_COUNTERS_NUMBER];
	u64 first_area; /* of the first vCPU's, which has the page tables of the two slots */
	u64 vcpus;
	u64 vcpu;
	u64 unused[(COMM_TRAPS - COMM_VCPU) / 8 - 1];
	struct trap traps[32];
};

#define AT(field, offset) _Static_assert(__builtin_offsetof(struct comm, field) == (offset), #field)
AT(kernel_mode, COMM_KERNEL_MODE);
AT(kernel_sp, COMM_KERNEL_SP);
AT(user_gs, COMM_USER_GS);
AT(kernel_gs, COMM_KERNEL_GS);
AT(on_syscall, COMM_ON_SYSCALL);
AT(on_event, COMM_ON_EVENT);
AT(vcpu_info, COMM_VCPU_INFO);
AT(scratch, COMM_SCRATCH);
AT(scratch_rcx, COMM_SCRATCH_RCX);
AT(resume_sp, COMM_RESUME_SP);
AT(resume_ip, COMM_RESUME_IP);
AT(cr3, COMM_CR3);
AT(area, COMM_AREA);
AT(panic, COMM_PANIC);
AT(pending, COMM_PENDING);
AT(booted, COMM_BOOTED);
AT(counters, COMM_COUNTERS);
AT(first_area, COMM_FIRST_AREA);
AT(vcpus, COMM_VCPUS);
AT(vcpu, COMM_VCPU);
AT(traps, COMM_TRAPS);
#undef AT

extern volatile struct comm comm;

/* What entry.S pushes on an exception. */
struct frame {
	u64 r15, r14, r13, r12, rbp, rbx;
	u64 r11, r10, r9, r8, rdi, rsi, rdx, rcx, rax;
	u64 vector, error, rip, cs, rflags, rsp, ss;
};

/* The first bytes of Xen's struct vcpu_info. */
struct vcpu_info {
	u8 pending;
	u8 mask;
	u8 pad[6];
	u64 selector;
	u64 cr2;
};

static inline volatile struct vcpu_info *vcpu_info(void)
{
	return (volatile struct vcpu_info *)comm.vcpu_info;
}

static inline void count(enum counter what)
{
	comm.counters[what]++;
}

static inline volatile u64 *direct(u64 physical)
{
	return (volatile u64 *)(DIRECT_BASE + physical);
}

/*
 * The CPL0 services of entry.S: int3 from inside the shim. The carry flag says which: clear,
 * invalidate the page at rdi; set, load the page table at rdi, or read CR2 if rdi is 1.
 */
static inline void load_cr3(u64 table)
{
	count(COUNT_CR3_LOADS);
	comm.pending = 0;
	__asm__ volatile("stc\n\tint3" : : "D"(table) : "memory", "cc");
}

static inline void flush_tlb(void)
{
	count(COUNT_FLUSHES);
	comm.pending = 0;
	__asm__ volatile("stc\n\tint3" : : "D"(comm.cr3) : "memory", "cc");
}

static inline void flush_page(u64 address)
{
	count(COUNT_INVLPGS);
	__asm__ volatile("clc\n\tint3" : : "D"(address & ~(PAGE_SIZE - 1)) : "memory", "cc");
}

static inline u64 read_cr2(void)
{
	u64 value;
	count(COUNT_CR2_READS);
	__asm__ volatile("stc\n\tint3" : "=a"(value) : "D"(1ul) : "memory", "cc");
	return value;
}

/* The invalidation that was put off, if any. */
static inline void flush_pending(void)
{
	u64 address = comm.pending;
	if (address) {
		comm.pending = 0;
		flush_page(address);
	}
}

/* hypercalls.c */
long forward(u64 number, u64 a1, u64 a2, u64 a3, u64 a4, u64 a5);

/* mmu.c */
long mmu_update(const u64 *requests, u64 number);
long update_va_mapping(u64 address, u64 value, u64 flags);
long mmuext_op(const void *operations, u64 number);
int make_reachable(u64 address, u64 error);

/* decode.c */
u64 fault_address(const struct frame *frame);

/* faults.c */
void panic(u64 why, u64 a, u64 b, u64 c, u64 d) __attribute__((noreturn));

#endif
