/* Hypercalls: the frequent ones are served here, the others by the VMM. */
#include "shim.h"

enum { MMU_UPDATE = 1, STACK_SWITCH = 3, FPU_TASKSWITCH = 5, UPDATE_DESCRIPTOR = 10, MULTICALL = 13, UPDATE_VA_MAPPING = 14,
       XEN_VERSION = 17, VCPU_OP = 24, SET_SEGMENT_BASE = 25, MMUEXT_OP = 26, PHYSDEV_OP = 33 };
enum { BASE_FS, BASE_GS_USER, BASE_GS_KERNEL, SELECTOR_GS_USER };

#define VCPUOP_IS_UP 3
#define PHYSDEVOP_SET_IOBITMAP 7

struct io_bitmap {
	const u8 *bits; /* 1: refused */
	u32 ports;
};

long dispatch(u64 a1, u64 a2, u64 a3, u64 a4, u64 a5, u64 number);

long forward(u64 number, u64 a1, u64 a2, u64 a3, u64 a4, u64 a5)
{
	long result;
	register u64 r10 __asm__("r10") = a4;
	register u64 r8 __asm__("r8") = a5;
	count(COUNT_FORWARDED);
	flush_pending();
	__asm__ volatile("out %%al, %1"
			 : "=a"(result)
			 : "i"(PORT_HYPERCALL), "0"(number), "D"(a1), "S"(a2), "d"(a3), "r"(r10), "r"(r8)
			 : "memory");
	return result;
}

/* Called on every switch to or from a task with port permissions. Only the doorbell can be permitted. */
static long set_io_bitmap(const struct io_bitmap *request)
{
	volatile u8 *tss = (volatile u8 *)direct(comm.area + AREA_TSS);
	u8 refused = DOORBELL_BITS;
	if (request->bits && request->ports >= (DOORBELL_BYTE + 1) * 8)
		refused = request->bits[DOORBELL_BYTE] & DOORBELL_BITS;
	u8 value = (u8)(~DOORBELL_BITS | refused);
	if (tss[TSS_BITMAP + DOORBELL_BYTE] != value)
		tss[TSS_BITMAP + DOORBELL_BYTE] = value;
	return 0;
}

static long set_segment_base(u64 which, u64 base)
{
	switch (which) {
	case BASE_FS:
		__asm__ volatile("wrfsbase %0" : : "r"(base));
		return 0;
	case BASE_GS_USER:
		comm.user_gs = base;
		return 0;
	case BASE_GS_KERNEL:
		comm.kernel_gs = base;
		__asm__ volatile("wrgsbase %0" : : "r"(base));
		return 0;
	case SELECTOR_GS_USER:
		comm.user_gs = 0;
		return 0;
	default:
		return -EINVAL;
	}
}

static long multicall(u64 *calls, u64 number)
{
	count(COUNT_MULTICALLS);
	for (; number; number--, calls += 8)
		calls[1] = (u64)dispatch(calls[2], calls[3], calls[4], calls[5], calls[6], calls[0]);
	return 0;
}

long dispatch(u64 a1, u64 a2, u64 a3, u64 a4, u64 a5, u64 number)
{
	switch (number) {
	case MMU_UPDATE:
		return mmu_update((const u64 *)a1, a2);
	case STACK_SWITCH:
		flush_pending();
		comm.kernel_sp = a2;
		/* The task that runs on may be in the middle of anything. */
		comm.kernel_mode = IN_KERNEL;
		return 0;
	case FPU_TASKSWITCH:
		return 0;
	case UPDATE_DESCRIPTOR:
		*direct(a1) = a2;
		return 0;
	case MULTICALL:
		return multicall((u64 *)a1, a2);
	case UPDATE_VA_MAPPING:
		return update_va_mapping(a1, a2, a3);
	case XEN_VERSION:
		/* The kernel asks this one for what a hypercall does besides: an event that became unmasked is taken. */
		if (a1 == 0)
			return XEN_INTERFACE;
		break;
	case VCPU_OP:
		/* Asked for every processor that the kernel could have, 8192 times. */
		if (a1 == VCPUOP_IS_UP && a2 >= comm.vcpus)
			return -ENOENT;
		break;
	case SET_SEGMENT_BASE:
		return set_segment_base(a1, a2);
	case MMUEXT_OP:
		return mmuext_op((const void *)a1, a2);
	case PHYSDEV_OP:
		if (a1 == PHYSDEVOP_SET_IOBITMAP)
			return set_io_bitmap((const struct io_bitmap *)a2);
		break;
	}
	return forward(number, a1, a2, a3, a4, a5);
}
