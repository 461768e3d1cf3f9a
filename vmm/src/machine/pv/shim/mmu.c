/*
 * Page tables. The guest kernel asks for changes as a Xen guest does; machine addresses are
 * guest-physical addresses, and nothing is validated: a guest can only harm itself, the
 * boundary that protects others is KVM's. Two rules make a kernel run at CPL3:
 *   - every present entry carries the USER bit;
 *   - requests to make page-table pages read-only are ignored, so that nothing traps.
 */
#include "shim.h"

#define UPDATE_PRESERVES_AD 2
#define UPDATE_M2P 1

/* Flags of update_va_mapping: what to invalidate; on which vCPUs: here, everywhere, or a pointer to the set. */
#define FLUSH_MASK 3
#define FLUSH_ALL 1
#define FLUSH_PAGE 2
#define FLUSH_WHERE_ALL 4ul
#define FLUSH_WHERE_SET (~7ul)

/* The kernel's direct map and image: where page-table pages are written through. */
#define KERNEL_DIRECT 0xffff888000000000ul
#define KERNEL_DIRECT_END 0xffffc88000000000ul
#define KERNEL_IMAGE 0xffffffff80000000ul
#define KERNEL_IMAGE_END 0xffffffffc0000000ul

/* End of the addresses of processes. */
#define USER_END 0x800000000000ul

/* Slots 256 to 271 are the hypervisor's in every Xen page table. */
#define FIRST_XEN_SLOT 256
#define AFTER_XEN_SLOTS 272

enum { PIN_L1, PIN_L2, PIN_L3, PIN_L4, UNPIN, NEW_BASE, FLUSH_LOCAL, INVLPG_LOCAL, FLUSH_MULTI, INVLPG_MULTI,
       FLUSH_EVERYWHERE, INVLPG_EVERYWHERE, FLUSH_CACHE, SET_LDT, NEW_USER_BASE = 15 };

static u64 reachable(u64 entry)
{
	return entry & PTE_PRESENT ? entry | PTE_USER : entry;
}

/* Another vCPU, or the processor, may change an entry at any time. */
static int replace(volatile u64 *slot, u64 old, u64 new)
{
	return __sync_bool_compare_and_swap(slot, old, new);
}

static void make_table_reachable(u64 table, int level, int deep)
{
	volatile u64 *entries = direct(table);
	for (int i = 0; i < 512; i++) {
		u64 entry = entries[i];
		if (!(entry & PTE_PRESENT))
			continue;
		if (level == 4 && i >= FIRST_XEN_SLOT && i < AFTER_XEN_SLOTS)
			continue;
		/* If it changed meanwhile, whoever did that has made it reachable. */
		if (!(entry & PTE_USER))
			replace(&entries[i], entry, entry | PTE_USER);
		if (deep && level > 1 && !(entry & PTE_LARGE))
			make_table_reachable(entry & PTE_FRAME, level - 1, deep);
	}
}

/*
 * After a fault with this error code: adds the USER bit wherever the path to `address` lacks it. Returns whether
 * the access is worth another try: because of that, or because another vCPU has done it meanwhile.
 */
int make_reachable(u64 address, u64 error)
{
	u64 table = comm.cr3 & PTE_FRAME;
	int changed = 0;
	u64 refusing = 0;
	for (int level = 4; level >= 1; level--) {
		volatile u64 *slot = &direct(table)[(address >> (12 + 9 * (level - 1))) & 511];
		u64 entry = *slot;
		if (!(entry & PTE_PRESENT))
			return 0;
		/* If it changed meanwhile, the access is tried again and faults again if it must. */
		if (!(entry & PTE_USER)) {
			replace(slot, entry, entry | PTE_USER);
			changed = 1;
		}
		refusing |= (error & ERROR_WRITE && !(entry & PTE_WRITE)) || (error & ERROR_FETCH && entry & PTE_NO_EXECUTE);
		if (entry & PTE_LARGE)
			break;
		table = entry & PTE_FRAME;
	}
	return changed || (comm.vcpus > 1 && !refusing);
}

static volatile u64 *leaf(u64 address)
{
	u64 table = comm.cr3 & PTE_FRAME;
	for (int level = 4; level > 1; level--) {
		u64 entry = direct(table)[(address >> (12 + 9 * (level - 1))) & 511];
		if (!(entry & PTE_PRESENT) || (entry & PTE_LARGE))
			return 0;
		table = entry & PTE_FRAME;
	}
	return &direct(table)[(address >> 12) & 511];
}

/*
 * Invalidating a page costs 20 microseconds here, and the fault after it as much again. The kernel
 * asks for it most often when it breaks copy-on-write: it clears the entry, invalidates, and sets
 * a writable entry, all to serve a page fault of the process. Then the invalidation is put off until
 * that entry is set, when a write to the page replaces whatever is cached.
 *
 * Until then nothing may reach the page through the stale entry. Nothing does, because it is put off only
 *   - for the page whose fault the kernel is serving, of which it holds a reference meanwhile, and only if that fault
 *     interrupted the process itself (IN_FAULT): no half-done copy from or to the process waits on the kernel's
 *     stack. (In a system call one could: reclaim may take away the very page that a write() reads from.)
 *   - if there is no other vCPU, which could look the entry up;
 *   - up to whatever comes next: a change of a page table, an exception or event, a switch of stacks, a
 *     call to the VMM, or the way out of the kernel.
 */
static void put_off_flush(u64 address)
{
	flush_pending();
	address &= ~(PAGE_SIZE - 1);
	if (comm.vcpus == 1 && comm.kernel_mode == IN_FAULT && address == (vcpu_info()->cr2 & ~(PAGE_SIZE - 1)) && address < USER_END)
		comm.pending = address | 1;
	else
		flush_page(address);
}

/* Whether this is the entry of the page whose invalidation is put off, and the page can be written through it. */
static int is_pending(const volatile u64 *slot, u64 entry)
{
	u64 wanted = PTE_PRESENT | PTE_WRITE | PTE_USER;
	u64 address = comm.pending & ~(PAGE_SIZE - 1);
	u64 table = comm.cr3 & PTE_FRAME;
	if ((entry & wanted) != wanted)
		return 0;
	for (int level = 4; level > 1; level--) {
		u64 upper = direct(table)[(address >> (12 + 9 * (level - 1))) & 511];
		if ((upper & wanted) != wanted || (upper & PTE_LARGE))
			return 0;
		table = upper & PTE_FRAME;
	}
	return slot == &direct(table)[(address >> 12) & 511];
}

/*
 * Sets an entry while an invalidation is put off. If it is that page's, a write that changes nothing makes
 * the processor look the entry up anew, unless what is cached could be written, too (a page that
 * was moved). The entry tells: it is set without its dirty bit, which a look-up for a write sets.
 */
static void set_while_pending(volatile u64 *slot, u64 entry)
{
	u64 address = comm.pending & ~(PAGE_SIZE - 1);
	if (!is_pending(slot, entry)) {
		*slot = entry;
		flush_pending();
		return;
	}
	*slot = entry & ~PTE_DIRTY;
	__asm__ volatile("lock orb $0, (%0)" : : "r"(address) : "memory", "cc");
	if (*slot & PTE_DIRTY) {
		count(COUNT_TOUCHES);
		comm.pending = 0;
	} else {
		flush_pending();
	}
	if (entry & ~*slot)
		*slot |= entry & PTE_ACCESSED_DIRTY;
}

/*
 * What this vCPU has just invalidated the others must, too. The VMM sees to it: it makes them look everything up anew
 * before they run on, and comes back when none runs as before.
 */
static void flush_others(u64 vcpus)
{
	vcpus &= ((1ul << comm.vcpus) - 1) & ~(1ul << comm.vcpu);
	if (vcpus)
		forward(FLUSH_VCPUS, vcpus, 0, 0, 0, 0);
}

long mmu_update(const u64 *requests, u64 number)
{
	for (; number; number--, requests += 2) {
		u64 pointer = requests[0] & ~7ul;
		u64 value = requests[1];
		count(COUNT_PTE_WRITES);
		if ((requests[0] & 3) == UPDATE_M2P) {
			((volatile u64 *)(AREA_BASE + AREA_M2P))[pointer >> 12] = value;
			continue;
		}
		value = reachable(value);
		if ((requests[0] & 3) == UPDATE_PRESERVES_AD) {
			u64 old = *direct(pointer);
			if (comm.vcpus > 1) {
				while (!replace(direct(pointer), old, value | (old & PTE_ACCESSED_DIRTY)))
					old = *direct(pointer);
				continue;
			}
			value |= old & PTE_ACCESSED_DIRTY;
		}
		if (comm.pending)
			set_while_pending(direct(pointer), value);
		else
			*direct(pointer) = value;
	}
	return 0;
}

long update_va_mapping(u64 address, u64 value, u64 flags)
{
	volatile u64 *slot = leaf(address);
	count(COUNT_VA_WRITES);
	if (!slot)
		return -EINVAL;
	if ((value & (PTE_PRESENT | PTE_USER)) == PTE_PRESENT &&
	    ((address >= KERNEL_DIRECT && address < KERNEL_DIRECT_END) || (address >= KERNEL_IMAGE && address < KERNEL_IMAGE_END)))
		value |= PTE_WRITE;
	value = reachable(value);
	flush_pending();
	u64 old = *slot;
	if (!((old ^ value) & ~PTE_ACCESSED_DIRTY))
		return 0;
	*slot = value;
	if (!(old & PTE_PRESENT))
		return 0;
	if ((flags & FLUSH_MASK) == FLUSH_ALL)
		flush_tlb();
	else if ((flags & FLUSH_MASK) == FLUSH_PAGE || ((old ^ value) & PTE_FRAME) || ((old & ~value) & PTE_WRITE))
		flush_page(address);
	if (flags & FLUSH_WHERE_SET)
		flush_others(*(const u64 *)(flags & FLUSH_WHERE_SET));
	else if (flags & FLUSH_WHERE_ALL)
		flush_others(~0ul);
	return 0;
}

/* A page table must map the area and the direct map before it is loaded. */
static void load_base(u64 table)
{
	volatile u64 *entries = direct(table);
	u64 area = (comm.first_area + AREA_SLOT_L3) | 0x67;
	u64 everything = (comm.first_area + AREA_DIRECT_L3) | 0x67;
	if ((entries[AREA_SLOT] | PTE_ACCESSED_DIRTY) != area)
		entries[AREA_SLOT] = area;
	if ((entries[DIRECT_SLOT] | PTE_ACCESSED_DIRTY) != everything)
		entries[DIRECT_SLOT] = everything;
	comm.cr3 = table;
	load_cr3(table);
}

struct operation {
	u32 command;
	u32 pad;
	u64 argument;
	u64 argument2;
};

long mmuext_op(const void *operations, u64 number)
{
	const struct operation *operation = operations;
	for (; number; number--, operation++) {
		u64 table = operation->argument << 12;
		switch (operation->command) {
		case PIN_L1:
		case PIN_L2:
		case PIN_L3:
			count(COUNT_PINS);
			make_table_reachable(table, (int)operation->command + 1, 0);
			break;
		case PIN_L4:
			count(COUNT_PINS);
			make_table_reachable(table, 4, !comm.booted);
			comm.booted = 1;
			break;
		case NEW_BASE:
			load_base(table);
			break;
		case FLUSH_LOCAL:
			flush_tlb();
			break;
		case FLUSH_MULTI:
			flush_tlb();
			flush_others(*(const u64 *)operation->argument2);
			break;
		case FLUSH_EVERYWHERE:
			flush_tlb();
			flush_others(~0ul);
			break;
		case INVLPG_LOCAL:
			put_off_flush(operation->argument);
			break;
		case INVLPG_MULTI:
			put_off_flush(operation->argument);
			flush_others(*(const u64 *)operation->argument2);
			break;
		case INVLPG_EVERYWHERE:
			put_off_flush(operation->argument);
			flush_others(~0ul);
			break;
		case UNPIN:
		case FLUSH_CACHE:
		case SET_LDT:
		case NEW_USER_BASE: /* user mode shares the kernel's page table */
			break;
		default:
			return -ENOSYS;
		}
	}
	return 0;
}
