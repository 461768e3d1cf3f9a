/*
 * Where a page fault struck. CR2 can only be read at CPL0, which costs five microseconds on a
 * software KVM; most faulting instructions have one memory operand, whose address follows
 * from the registers in a few nanoseconds. Whatever is not certain is left to CR2.
 */
#include "shim.h"

#define ERROR_WRITE 2ul
#define ERROR_FETCH 16ul
#define LONGEST_INSTRUCTION 15

enum { REX_B = 1, REX_X = 2, REX_R = 4, REX_W = 8 };

struct instruction {
	const u8 *next;
	int rex;
	int size;      /* bytes accessed, or more */
	int immediate; /* bytes after the operand */
	int scale;     /* what a displacement of one byte counts */
};

static u64 gpr(const struct frame *frame, int number)
{
	switch (number) {
	case 0: return frame->rax;
	case 1: return frame->rcx;
	case 2: return frame->rdx;
	case 3: return frame->rbx;
	case 4: return frame->rsp;
	case 5: return frame->rbp;
	case 6: return frame->rsi;
	case 7: return frame->rdi;
	case 8: return frame->r8;
	case 9: return frame->r9;
	case 10: return frame->r10;
	case 11: return frame->r11;
	case 12: return frame->r12;
	case 13: return frame->r13;
	case 14: return frame->r14;
	default: return frame->r15;
	}
}

static long displacement32(const u8 *bytes)
{
	int value;
	__builtin_memcpy(&value, bytes, 4);
	return value;
}

static int within_page(u64 address, int size)
{
	return (address & (PAGE_SIZE - 1)) + (u64)size <= PAGE_SIZE;
}

/* The address of a ModRM memory operand; 0 if it is a register. */
static int operand(const struct frame *frame, struct instruction *in, u64 *address)
{
	u8 modrm = *in->next++;
	int mod = modrm >> 6, rm = modrm & 7;
	u64 sum = 0;
	if (mod == 3)
		return 0;
	if (rm == 4) {
		u8 sib = *in->next++;
		int index = ((sib >> 3) & 7) | (in->rex & REX_X ? 8 : 0);
		if (index != 4)
			sum += gpr(frame, index) << (sib >> 6);
		if ((sib & 7) == 5 && mod == 0) {
			sum += (u64)displacement32(in->next);
			in->next += 4;
		} else {
			sum += gpr(frame, (sib & 7) | (in->rex & REX_B ? 8 : 0));
		}
	} else if (rm == 5 && mod == 0) {
		*address = (u64)in->next + 4 + (u64)in->immediate + (u64)displacement32(in->next);
		return 1;
	} else {
		sum += gpr(frame, rm | (in->rex & REX_B ? 8 : 0));
	}
	if (mod == 1)
		sum += (u64)((long)(signed char)*in->next * in->scale);
	else if (mod == 2)
		sum += (u64)displacement32(in->next);
	*address = sum;
	return 1;
}

/* Two-byte opcodes (0f xx) with one ModRM memory operand: sets size and immediate; 0 if unknown. */
static int two_byte(struct instruction *in, u8 opcode, int vector_size)
{
	in->immediate = 0;
	switch (opcode) {
	case 0x10: case 0x11: case 0x12: case 0x13: case 0x16: case 0x17: case 0x28: case 0x29: case 0x2b: case 0x2e: case 0x2f:
	case 0x54: case 0x55: case 0x56: case 0x57: case 0x58: case 0x59: case 0x5c: case 0x5e:
	case 0x6e: case 0x6f: case 0x7e: case 0x7f: case 0x74: case 0x75: case 0x76: case 0xd6: case 0xda: case 0xdb: case 0xde:
	case 0xd4: case 0xe7: case 0xeb: case 0xef: case 0xf8: case 0xfa: case 0xfb: case 0xfe:
		in->size = vector_size;
		return 1;
	case 0x90 ... 0x9f: case 0xb0: case 0xb6: case 0xbe: case 0xc0:
		in->size = 1;
		return 1;
	case 0xb7: case 0xbf:
		in->size = 2;
		return 1;
	case 0x40 ... 0x4f: case 0xaf: case 0xb1: case 0xc1:
		return 1;
	default:
		return 0;
	}
}

static int one_byte(struct instruction *in, u8 opcode)
{
	in->immediate = 0;
	switch (opcode) {
	case 0x00: case 0x02: case 0x08: case 0x0a: case 0x20: case 0x22: case 0x28: case 0x2a: case 0x30: case 0x32: case 0x38: case 0x3a:
	case 0x84: case 0x86: case 0x88: case 0x8a:
		in->size = 1;
		return 1;
	case 0x80: case 0xc6:
		in->size = 1;
		in->immediate = 1;
		return 1;
	case 0x01: case 0x03: case 0x09: case 0x0b: case 0x11: case 0x13: case 0x19: case 0x1b: case 0x21: case 0x23: case 0x29: case 0x2b:
	case 0x31: case 0x33: case 0x39: case 0x3b: case 0x63: case 0x85: case 0x87: case 0x89: case 0x8b:
		return 1;
	case 0x83: case 0x6b: case 0xc1:
		in->immediate = 1;
		return 1;
	case 0x81: case 0x69: case 0xc7:
		in->immediate = in->size == 2 ? 2 : 4;
		return 1;
	case 0xf6: /* test with an immediate; not, neg and the rest without */
		in->size = 1;
		in->immediate = *in->next & 0x30 ? 0 : 1;
		return 1;
	case 0xf7:
		in->immediate = *in->next & 0x30 ? 0 : in->size == 2 ? 2 : 4;
		return 1;
	case 0xff: /* inc and dec; near call, near jump and push, whose push `implied` has dealt with */
		in->size = 8;
		return 1;
	default:
		return 0;
	}
}

/* VEX-coded moves: what memcpy and memset use. */
static int vex(struct instruction *in, u8 first)
{
	u8 byte = *in->next++;
	in->rex = byte & 0x80 ? 0 : REX_R;
	if (first == 0xc4) {
		in->rex |= (byte & 0x40 ? 0 : REX_X) | (byte & 0x20 ? 0 : REX_B);
		if ((byte & 0x1f) != 1)
			return 0;
		byte = *in->next++;
	}
	return two_byte(in, *in->next++, byte & 4 ? 32 : 16);
}

/*
 * EVEX-coded moves and comparisons: what memcpy and strlen use where there is AVX-512. Without a mask (which
 * would make some bytes not count) and without broadcast, all of these access a whole vector.
 */
static int evex(struct instruction *in)
{
	u8 first = in->next[0], second = in->next[1], third = in->next[2], opcode = in->next[3];
	int map = first & 15, prefix = second & 3, length = (third >> 5) & 3;
	int known = 0;
	in->next += 4;
	if ((third & 0x17) || !(second & 4) || length == 3)
		return 0;
	in->rex = (first & 0x40 ? 0 : REX_X) | (first & 0x20 ? 0 : REX_B);
	in->size = 16 << length;
	in->scale = in->size;
	in->immediate = map == 3;
	if (map == 1 && (opcode == 0x6f || opcode == 0x7f))
		known = prefix != 0;
	else if (map == 1 && (opcode == 0x10 || opcode == 0x11 || opcode == 0x28 || opcode == 0x29))
		known = prefix < 2;
	else if (map == 1 && (opcode == 0xe7 || opcode == 0x74 || opcode == 0x75 || opcode == 0xda || opcode == 0xeb || opcode == 0xef))
		known = prefix == 1;
	else if (map == 2 && opcode == 0x26)
		known = prefix == 1 || prefix == 2;
	else if (map == 3 && (opcode == 0x3e || opcode == 0x3f))
		known = prefix == 1;
	return known;
}

/* String, stack and branch instructions: an implied operand. */
static int implied(const struct frame *frame, struct instruction *in, u8 opcode, u64 *address)
{
	switch (opcode) {
	case 0xaa:
		in->size = 1;
		/* fall through */
	case 0xab:
		*address = frame->rdi;
		return 1;
	case 0xa4:
		in->size = 1;
		/* fall through */
	case 0xa5:
		*address = frame->error & ERROR_WRITE ? frame->rdi : frame->rsi;
		return 1;
	case 0x50 ... 0x57: case 0xe8:
		if (in->size == 2)
			return 0;
		in->size = 8;
		*address = frame->rsp - 8;
		return 1;
	case 0x58 ... 0x5f: case 0xc3:
		if (in->size == 2)
			return 0;
		in->size = 8;
		*address = frame->rsp;
		return 1;
	case 0xff: /* call and push: reading the operand comes first and is no write */
		if (!(frame->error & ERROR_WRITE) || !(*in->next & 0x30))
			return 0;
		in->size = 8;
		*address = frame->rsp - 8;
		return 1;
	default:
		return 0;
	}
}

static int decode(const struct frame *frame, u64 *address)
{
	struct instruction in = { .next = (const u8 *)frame->rip, .size = 4, .scale = 1 };
	for (;; in.next++) {
		if (*in.next == 0x66)
			in.size = 2;
		else if (*in.next != 0xf0 && *in.next != 0xf2 && *in.next != 0xf3)
			break;
		if ((u64)in.next - frame->rip >= 4)
			return 0;
	}
	if ((*in.next & 0xf0) == 0x40)
		in.rex = *in.next++;
	if (in.rex & REX_W)
		in.size = 8;
	u8 opcode = *in.next++;
	int known;
	/* Far calls and jumps; near ones and pushes of 16 bits: rare, and of more than one access. */
	if (opcode == 0xff && (*in.next & 0x30) && ((*in.next & 0x08) || in.size == 2))
		return 0;
	if (opcode == 0xc5 || opcode == 0xc4)
		known = vex(&in, opcode);
	else if (opcode == 0x62)
		known = evex(&in);
	else if (opcode == 0x0f)
		known = two_byte(&in, *in.next++, 16);
	else if (implied(frame, &in, opcode, address))
		return within_page(*address, in.size);
	else
		known = one_byte(&in, opcode);
	return known && operand(frame, &in, address) && within_page(*address, in.size);
}

u64 fault_address(const struct frame *frame)
{
	u64 address;
	/* Near a page's end the instruction itself may straddle two pages. */
	if ((frame->rip & (PAGE_SIZE - 1)) > PAGE_SIZE - LONGEST_INSTRUCTION)
		return read_cr2();
	if (frame->error & ERROR_FETCH) {
		count(COUNT_DECODED);
		return frame->rip;
	}
	if (!decode(frame, &address))
		return read_cr2();
	count(COUNT_DECODED);
	return address;
}
