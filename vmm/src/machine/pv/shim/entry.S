/*
 * The ways into the shim: system calls, hypercalls, exceptions, events; and the few
 * instructions that run at CPL0. A software KVM interprets CPL0 code at about a microsecond
 * per instruction, so there are as few of them as possible.
 */
#include "layout.h"

#define C(field) comm+field(%rip)

/* ------------------------------------------------------------------ CPL0 */
	.section .cpl0, "awx"

/* Vectors nobody expects: the VMM tells which by the address. */
	.org CPL0_VECTORS
	.rept 256
	out %al, $PORT_VECTOR
	hlt
	.balign 8
	.endr

/*
 * int3. From the shim it asks for a service (shim.h): with carry clear, to invalidate the page at
 * rdi; with carry set, to load the page table rdi or, if that is 1, to read CR2 into rax. From anywhere else it
 * is a breakpoint of the guest; then invalidating a page has done no harm. The most
 * frequent service takes four instructions, because the shim finds out who asked.
 */
	.org CPL0_BREAKPOINT
	jc 1f
	invlpg (%rdi)
	lea breakpoint_frame(%rip), %rsp
	iretq
1:	cmpl $(AREA_BASE >> 32) - 0x100000000, 4(%rsp)
	jne 2f
	test $1, %dil
	jnz 3f
	mov %rdi, %cr3
	iretq
3:	mov %cr2, %rax
	iretq
2:	lea breakpoint_frame(%rip), %rsp
	iretq

/* SYSCALL where it enters CPL0: go on at CPL3 with rcx, r11 and rsp as they are. */
	.org CPL0_SYSCALL
	mov %rsp, syscall_rsp(%rip)
	lea syscall_frame(%rip), %rsp
	iretq

	.org CPL0_BREAKPOINT_FRAME
breakpoint_frame:
	.quad AREA_BASE + SHIM_VECTORS + 3 * SHIM_VECTOR_SIZE, CODE_CPL3, 0x202
	.quad AREA_BASE + AREA_CPL0_STACK - 40, DATA_CPL3
	.org CPL0_SYSCALL_FRAME
syscall_frame:
	.quad AREA_BASE + SHIM_SYSCALL, CODE_CPL3, 0x202
syscall_rsp:
	.quad 0, DATA_CPL3

/* ------------------------------------------------------------------ CPL3 */
	.section .shim, "ax"
	.org SHIM_SYSCALL - AREA_SHIM
	jmp syscall
	.org SHIM_HYPERCALL - AREA_SHIM
	jmp hypercall
/* Jumped to by a patched xen_iret: an iret frame on the stack, registers live. */
	.org SHIM_IRET - AREA_SHIM
	pushq $0
	push %rcx
	push %r11
	push %rax
	jmp iret
/* The VMM interrupts the guest here, with an iret frame on the exception stack. */
	.org SHIM_UPCALL - AREA_SHIM
	pushq $0
	pushq $32
	jmp exception
/*
 * A page fault where system calls are bounced: if SYSCALL stays at CPL3, LSTAR's page, which is
 * for CPL0 alone, cannot be fetched from. That is a system call.
 */
	.org SHIM_FAULT_BOUNCE - AREA_SHIM
	cmpl $0x15, (%rsp)
	jne 1f
	cmpw $CPL0_SYSCALL, 8(%rsp)	/* of whichever copy */
	jne 1f
	cmpl $(AREA_BASE >> 32) - 0x100000000, 12(%rsp)
	jne 1f
	mov 32(%rsp), %rsp
	jmp syscall
1:	pushq $14
	jmp exception

	.org SHIM_VECTORS - AREA_SHIM
	.set vector, 0
	.rept 32
	.org SHIM_VECTORS - AREA_SHIM + vector * SHIM_VECTOR_SIZE
	/* After an invalidation: back to the shim. */
	.if vector == 3
	cmpl $(AREA_BASE >> 32) - 0x100000000, 4(%rsp)
	jne 1f
	iretq
1:
	.endif
	/* In the kernel, #UD and #GP may be instructions that the VMM emulates; if not, it returns here. */
	.if vector == 6 || vector == 13
	cmpb $0, C(COMM_KERNEL_MODE)
	je 1f
	.if vector == 6
	out %al, $PORT_INVALID_OPCODE
	.else
	out %al, $PORT_PROTECTION
	.endif
1:
	.endif
	.if vector != 8 && vector != 10 && vector != 11 && vector != 12 && vector != 13 && vector != 14 && vector != 17 && vector != 21
	pushq $0
	.endif
	pushq $vector
	jmp exception
	.set vector, vector + 1
	.endr

/* -------------------------------------------- SYSCALL, from user and kernel */
syscall:
	cmpb $0, C(COMM_KERNEL_MODE)
	jne 1f
	mov %rsp, C(COMM_SCRATCH)
	mov C(COMM_KERNEL_SP), %rsp
	pushq $DATA_CPL3
	pushq C(COMM_SCRATCH)
	push %r11
	pushq $CODE_CPL3
	push %rcx
	push %r11
	push %rcx
	movb $IN_KERNEL, C(COMM_KERNEL_MODE)
	rdgsbase %rcx
	mov %rcx, C(COMM_USER_GS)
	mov C(COMM_KERNEL_GS), %rcx
	wrgsbase %rcx
	mov C(COMM_VCPU_INFO), %rcx
	movb $1, 1(%rcx)
	jmp *C(COMM_ON_SYSCALL)
1:	cmp $23, %eax
	je iret
	push %rcx
	/* fall through, as if called */

/* Called by the kernel: number in eax, arguments in rdi, rsi, rdx, r10, r8. Keeps all other registers. */
hypercall:
	push %rcx
	push %r11
	push %r9
	mov %r10, %rcx
	mov %rax, %r9
	cld
	call dispatch
	mov C(COMM_VCPU_INFO), %rcx
	cmpw $1, (%rcx)		/* an event pending, and not masked */
	je 1f
	pop %r9
	pop %r11
	pop %rcx
	ret
	/* Take the event as if the kernel were interrupted just after its hypercall. */
1:	pop %r9
	pop %r11
	pop %rcx
	mov %rsp, C(COMM_SCRATCH)
	mov %rcx, C(COMM_SCRATCH_RCX)
	mov %rsp, %rcx
	lea comm+(AREA_EXCEPTION_STACK-AREA_COMM)(%rip), %rsp
	pushq $DATA_CPL3
	pushq C(COMM_SCRATCH)
	addq $8, (%rsp)
	pushfq
	pushq $CODE_CPL3
	pushq (%rcx)
	mov C(COMM_SCRATCH_RCX), %rcx
	pushq $0
	pushq $32
	jmp exception

/* ------------------------------------------------------------------ iret
 * On the stack: rax, r11, rcx, flags, then the frame: rip, cs, rflags, rsp, ss.
 */
iret:
	cmpq $0, C(COMM_PENDING)
	jne 4f
5:	mov C(COMM_VCPU_INFO), %rcx
	mov 48(%rsp), %eax
	shr $9, %eax
	not %eax
	and $1, %eax
	movb %al, 1(%rcx)
	jnz 1f
	cmpb $0, (%rcx)
	jne iret_upcall
1:	testb $3, 40(%rsp)
	jz 3f
	/* To user mode. What iretq would refuse becomes a #GP of the process, not of the shim. */
	cmpl $CODE_CPL3, 40(%rsp)
	jne iret_refused
	mov 32(%rsp), %rcx
	sar $47, %rcx
	inc %rcx
	cmp $1, %rcx
	ja iret_refused
	mov C(COMM_USER_GS), %rcx
	movb $0, C(COMM_KERNEL_MODE)
	wrgsbase %rcx
	movq $DATA_CPL3, 64(%rsp)
2:	pop %rax
	pop %r11
	pop %rcx
	add $8, %rsp
	iretq
3:	movq $CODE_CPL3, 40(%rsp)
	movq $DATA_CPL3, 64(%rsp)
	jmp 2b
	/* An invalidation that was put off must not be put off any longer. */
4:	mov %rdi, %rax
	mov C(COMM_PENDING), %rdi
	movq $0, C(COMM_PENDING)
	incq comm+COMM_COUNTERS+80(%rip)
	and $~4095, %rdi	/* clears carry, too */
	int3
	mov %rax, %rdi
	jmp 5b

/* An event came while the kernel was on its way out: it is the event's entry that gets the frame. */
iret_upcall:
	movb $1, 1(%rcx)
	mov (%rsp), %rax
	mov 8(%rsp), %r11
	mov %r11, 24(%rsp)
	add $16, %rsp
	jmp *C(COMM_ON_EVENT)

iret_refused:
	mov C(COMM_USER_GS), %rcx
	movb $0, C(COMM_KERNEL_MODE)
	wrgsbase %rcx
	mov %rsp, %rcx
	lea comm+(AREA_EXCEPTION_STACK-AREA_COMM)(%rip), %rsp
	pushq $DATA_CPL3
	pushq 56(%rcx)
	pushq 48(%rcx)
	pushq $CODE_CPL3
	pushq 32(%rcx)
	pushq $0
	pushq $13
	mov (%rcx), %rax
	mov 8(%rcx), %r11
	mov 16(%rcx), %rcx
	/* fall through */

/* ------------------------------------------------------------ exceptions
 * On one of the area's stacks: vector, error code, rip, cs, rflags, rsp, ss.
 */
exception:
	push %rax
	push %rcx
	push %rdx
	push %rsi
	push %rdi
	push %r8
	push %r9
	push %r10
	push %r11
	push %rbx
	push %rbp
	push %r12
	push %r13
	push %r14
	push %r15
	cld
	testl $0x40000, 152(%rsp)	/* alignment checks are for user code alone */
	jnz 3f
1:	mov %rsp, %rdi
	call shim_exception
	pop %r15
	pop %r14
	pop %r13
	pop %r12
	pop %rbp
	pop %rbx
	test %rax, %rax
	jz 2f
	pop %r11
	pop %r10
	pop %r9
	pop %r8
	pop %rdi
	pop %rsi
	pop %rdx
	pop %rcx
	pop %rax
	mov C(COMM_RESUME_SP), %rsp
	jmp *C(COMM_RESUME_IP)
	/* Nothing for the kernel to see: try again. */
2:	pop %r11
	pop %r10
	pop %r9
	pop %r8
	pop %rdi
	pop %rsi
	pop %rdx
	pop %rcx
	pop %rax
	add $16, %rsp
	iretq
3:	pushfq
	andl $~0x40000, (%rsp)
	popfq
	jmp 1b

	.section .note.GNU-stack, "", @progbits
