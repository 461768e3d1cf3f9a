/* Exceptions and events: from wherever they struck to the guest kernel's handler. */
#include "shim.h"

#define VECTOR_PAGE_FAULT 14
#define VECTOR_EVENT 32

/* Selectors as a Xen kernel expects to see them. */
#define XEN_KERNEL_CODE 0xe030
#define XEN_KERNEL_DATA 0xe02b

#define FLAG_INTERRUPT 0x200ul
#define FLAG_IOPL 0x3000ul

/* A write to a page that is there, but not writable. */
#define COPY_ON_WRITE (ERROR_PRESENT | ERROR_WRITE)

/* Vectors for which the processor pushes an error code. */
#define WITH_ERROR 0x00227d00u

void panic(u64 why, u64 a, u64 b, u64 c, u64 d)
{
	comm.panic[0] = why;
	comm.panic[1] = a;
	comm.panic[2] = b;
	comm.panic[3] = c;
	comm.panic[4] = d;
	for (;;)
		__asm__ volatile("out %%al, %0" : : "i"(PORT_PANIC) : "memory");
}

static u64 read_gs(void)
{
	u64 base;
	__asm__ volatile("rdgsbase %0" : "=r"(base));
	return base;
}

/*
 * Builds the frame that the guest kernel's entry code expects and says where to go on
 * (comm.resume_*). Returns 0 if the interrupted code should simply go on.
 */
u64 shim_exception(struct frame *frame)
{
	volatile struct vcpu_info *info = vcpu_info();
	u64 vector = frame->vector;
	u64 error = frame->error;
	int kernel = comm.kernel_mode != 0;
	u64 handler;
	int masks;

	/*
	 * A fault of the shim itself means that the guest kernel gave it a bad pointer or stack.
	 * (In user mode it means that a process jumped here: that is a fault like any other.)
	 */
	if (kernel && frame->rip - AREA_BASE < AREA_STRIDE * AREA_MOST_VCPUS)
		panic(vector, frame->rip, vector == VECTOR_PAGE_FAULT ? read_cr2() : 0, error, frame->rsp);

	if (kernel) {
		/* What the kernel does now has nothing to do with a process's fault that it may have been serving. */
		comm.kernel_mode = IN_KERNEL;
		flush_pending();
	}
	if (vector == VECTOR_EVENT) {
		count(COUNT_UPCALLS);
		handler = comm.on_event;
		masks = 1;
	} else {
		if (vector == VECTOR_PAGE_FAULT) {
			u64 address = fault_address(frame);
			count(COUNT_FAULTS);
			if (kernel) {
				count(COUNT_KERNEL_FAULTS);
				/* The kernel believes it is supervisor: its own pages must be reachable from CPL3. */
				if ((error & (ERROR_PRESENT | ERROR_USER)) == (ERROR_PRESENT | ERROR_USER) && make_reachable(address, error)) {
					flush_page(address);
					return 0;
				}
				error &= ~ERROR_USER;
			}
			info->cr2 = address;
		} else {
			count(COUNT_EXCEPTIONS);
		}
		handler = comm.traps[vector & 31].address;
		masks = comm.traps[vector & 31].masks != 0;
	}
	if (!handler)
		panic(vector, frame->rip, info->cr2, error, frame->rsp);

	u64 stack = (kernel ? frame->rsp : comm.kernel_sp) & ~15ul;
	/* From here on a fault is the kernel's: a bad stack must not make this recurse. */
	if (!kernel) {
		comm.user_gs = read_gs();
		__asm__ volatile("wrgsbase %0" : : "r"(comm.kernel_gs));
		comm.kernel_mode = vector == VECTOR_PAGE_FAULT && (error & COPY_ON_WRITE) == COPY_ON_WRITE ? IN_FAULT : IN_KERNEL;
	}
	int with_error = vector < 32 && ((WITH_ERROR >> vector) & 1);
	u64 *slot = (u64 *)(stack - (with_error ? 64 : 56));
	comm.resume_sp = (u64)slot;
	comm.resume_ip = handler;
	*slot++ = frame->rcx;
	*slot++ = frame->r11;
	if (with_error)
		*slot++ = error;
	*slot++ = frame->rip;
	*slot++ = kernel ? XEN_KERNEL_CODE : CODE_CPL3;
	*slot++ = (frame->rflags & ~(FLAG_IOPL | FLAG_INTERRUPT)) | (info->mask ? 0 : FLAG_INTERRUPT);
	*slot++ = frame->rsp;
	*slot++ = kernel ? XEN_KERNEL_DATA : DATA_CPL3;
	if (masks)
		info->mask = 1;
	return 1;
}
