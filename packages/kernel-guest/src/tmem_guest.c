// SPDX-License-Identifier: (MIT OR GPL-2.0)
/*
 * Frontswap and cleancache of a Linux guest (3.5 to 5.16; built against 5.10), kept by a process of the host that speaks
 * Xen's tmem. Cleancache only where the kernel has it: Debian's is built without.
 *
 * A hypercall is an entry of a ring in four frames of the guest's memory, which the host has mapped: a tmem_op as Xen's
 * guests made it, and room for the answer. The doorbell is a byte to an I/O port, behind which is a socket.
 *
 * Invariants:
 * - The host does entries in their order, each at least once: one that dies may have done the entry at `tail` already,
 *   and the next host does it again. PUT, GET from a persistent pool and FLUSH may be repeated; a GET from an ephemeral
 *   pool misses then, which it may at any time.
 * - A page that the host took is never answered with -1. Its slot on the disk holds something older, and the kernel would
 *   read that. The load is tried again for as long as the module may be patient; then the kernel stops, and says why.
 * - A page that comes back is copied by the guest's own processor. An emulated one (TCG) keeps translations of the code in
 *   a frame, and learns of writes only where it does them itself.
 * - Nothing of cleancache sleeps: puts and invalidations come with interrupts off, under the lock of the page cache.
 *
 * The lock is taken with interrupts as they are: none of these hooks is called by an interrupt handler.
 */
#define pr_fmt(format) KBUILD_MODNAME ": " format

#include <linux/bug.h>
#include <linux/cleancache.h>
#include <linux/delay.h>
#include <linux/frontswap.h>
#include <linux/highmem.h>
#include <linux/huge_mm.h>
#include <linux/io.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/module.h>
#include <linux/nmi.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/timekeeping.h>

/* Commands and pool flags of Xen's public header, and its structure for guests of 64 bits. */
enum { TMEM_NEW_POOL = 1, TMEM_DESTROY_POOL = 2, TMEM_PUT_PAGE = 4, TMEM_GET_PAGE = 5, TMEM_FLUSH_PAGE = 6,
       TMEM_FLUSH_OBJECT = 7,
       /* Ours: the frame `cmfn` has `index` events. Xen has no such number. */
       TMEM_TRACE = 0x74726163 };
enum { TMEM_POOL_PERSIST = 1, TMEM_POOL_SHARED = 2, TMEM_SPEC_VERSION_SHIFT = 24, TMEM_SPEC_VERSION = 1 };

struct tmem_op {
	u32 cmd;
	s32 pool_id;
	union {
		struct {
			u64 uuid[2];
			u32 flags;
			u32 arg1;
		} creat;
		struct {
			u64 oid[3];
			u32 index;
			u32 tmem_offset;
			u32 pfn_offset;
			u32 len;
			u64 cmfn;
		} gen;
	} u;
};

struct entry {
	struct tmem_op op;
	s32 result;
	u32 reserved;
};

enum { RING_ENTRIES = PAGE_SIZE / sizeof(struct entry), RING_ORDER = 2, FRAMES_ORDER = 6, RING_VERSION = 1 };

/* Four frames, one after the other: this head, the entries, a frame for a page that comes back, and one for events. */
struct ring {
	char magic[8];
	u32 version;
	u32 entries;
	/* Written by the guest: entries that were asked, in all, modulo 2^32. */
	u32 head;
	u32 padding[11];
	/* Written by the host: entries that were answered; and whether it looks by itself, without a bell. */
	u32 tail;
	u32 awake;
};

static unsigned short port = 0x505;
module_param(port, ushort, 0444);
MODULE_PARM_DESC(port, "I/O port of the doorbell");
static unsigned int patience_ms = 60000;
module_param(patience_ms, uint, 0444);
MODULE_PARM_DESC(patience_ms, "how long a host may be away, or without a page that it took, before the kernel stops");
static bool posted = true;
module_param(posted, bool, 0444);
MODULE_PARM_DESC(posted, "flushes, and pages of cleancache, are left in the ring, and are not waited for");

static bool trace;
module_param(trace, bool, 0444);
MODULE_PARM_DESC(trace, "tell the host what the kernel calls: frontswap, cleancache, and MMU notifiers of who has /dev/tmem_trace open");

/*
 * What the host was asked, by command; stores that it refused, and those that it was not asked for; loads that it had to
 * be asked for again; bells. Those of the commands that were cleancache's, by hook.
 */
static unsigned long pools, puts, gets, page_flushes, object_flushes, refused, declined, again, bells;
static unsigned long clean_puts, clean_hits, clean_misses, clean_page_flushes;
module_param(pools, ulong, 0444);
module_param(puts, ulong, 0444);
module_param(gets, ulong, 0444);
module_param(page_flushes, ulong, 0444);
module_param(object_flushes, ulong, 0444);
module_param(refused, ulong, 0444);
module_param(declined, ulong, 0444);
module_param(again, ulong, 0444);
module_param(bells, ulong, 0444);
module_param(clean_puts, ulong, 0444);
module_param(clean_hits, ulong, 0444);
module_param(clean_misses, ulong, 0444);
module_param(clean_page_flushes, ulong, 0444);

static DEFINE_SPINLOCK(lock);
static struct ring *ring;
static struct entry *entries;
static void *bounce;
/* Of each entry a frame for a page that the kernel frees before the host has looked at it. */
static void *frames;
static u32 head;
static s32 pool;

static u64 now_ms(void)
{
	return div_u64(ktime_get_mono_fast_ns(), NSEC_PER_MSEC);
}

/*
 * Says where the ring is, as a line of text. A host that begins in the middle of one takes the next: until it has
 * answered the line comes again.
 */
static void say_where(void)
{
	static const char digits[] = "0123456789abcdef";
	u32 frame = virt_to_phys(ring) >> PAGE_SHIFT;
	int shift;

	outb('T', port);
	for (shift = 28; shift >= 0; shift -= 4)
		outb(digits[frame >> shift & 15], port);
	outb('\n', port);
	bells++;
}

/* Waits until the host has answered all entries before `until`; wakes it for that. */
static void wait_for(u32 until)
{
	u64 begun, said;
	unsigned int spins = 0;

	if ((s32)(smp_load_acquire(&ring->tail) - until) >= 0)
		return;
	/* Pairs with the host's: it says that it sleeps before it looks for the last time. */
	smp_mb();
	if (!READ_ONCE(ring->awake)) {
		outb('!', port);
		bells++;
	}
	begun = said = now_ms();
	while ((s32)(smp_load_acquire(&ring->tail) - until) < 0) {
		u64 now;

		cpu_relax();
		if (++spins % 256 != 0)
			continue;
		now = now_ms();
		if (now - said >= 20) {
			/* A bell that rang while no host was there is lost. */
			say_where();
			said = now;
			touch_softlockup_watchdog();
		}
		if (now - begun >= patience_ms)
			panic("tmem_guest: no answer from the host for %u ms: it has pages that nobody else has\n", patience_ms);
	}
}

/* An entry to fill in. Another one's turn ends with `ask`. */
static struct entry *next_entry(u32 cmd)
{
	struct entry *entry;

	wait_for(head - RING_ENTRIES + 1);
	entry = &entries[head % RING_ENTRIES];
	memset(entry, 0, sizeof(*entry));
	entry->op.cmd = cmd;
	entry->op.pool_id = pool;
	return entry;
}

/* Hands the entry to the host, and answers what it says. */
static s32 ask(struct entry *entry)
{
	smp_store_release(&ring->head, ++head);
	wait_for(head);
	return entry->result;
}

/* Hands the entry to the host, which does it before all that is asked later. */
static void post(struct entry *entry)
{
	if (posted)
		smp_store_release(&ring->head, ++head);
	else
		ask(entry);
}

/*
 * Something that happened: a page (area, offset; or a file's key, folded, and an index) or a range (first byte, end), an
 * answer or a kind, whose program or which pool.
 */
struct event {
	u64 time;
	u64 first;
	u64 end;
	u16 kind;
	s16 detail;
	u32 who;
};

enum { EVENT_STORE = 1, EVENT_LOAD, EVENT_INVALIDATE, EVENT_AREA, EVENT_CLEAN_PUT, EVENT_CLEAN_GET,
       EVENT_CLEAN_INVALIDATE, EVENT_CLEAN_INODE, EVENT_CLEAN_FS };
enum { EVENT_REGISTER = 16, EVENT_START, EVENT_END, EVENT_RANGE, EVENT_CHANGE_PTE, EVENT_YOUNG, EVENT_RELEASE };
enum { EVENTS = PAGE_SIZE / sizeof(struct event) };

static struct event *events;
static unsigned int recorded;

/* Hands over what was recorded; the lock is held. */
static void hand_over(void)
{
	struct entry *entry;

	if (recorded == 0)
		return;
	entry = next_entry(TMEM_TRACE);
	entry->op.u.gen.index = recorded;
	entry->op.u.gen.cmfn = virt_to_phys(events) >> PAGE_SHIFT;
	ask(entry);
	recorded = 0;
}

/* The lock is held: the order of events is that in which it was taken. */
static void record(u16 kind, u64 first, u64 end, s16 detail, u32 who)
{
	if (!trace)
		return;
	events[recorded++] = (struct event){ ktime_get_mono_fast_ns(), first, end, kind, detail, who };
	if (recorded == EVENTS)
		hand_over();
}

/* A swap slot's name, as Linux gave it in Xen's guests: 16 objects for each area. */
static void name(struct entry *entry, unsigned int type, pgoff_t offset)
{
	entry->op.u.gen.oid[0] = type << 4 | (offset & 15);
	entry->op.u.gen.index = offset >> 4;
}

static void frontswap_init_area(unsigned int type)
{
}

static int store(unsigned int type, pgoff_t offset, struct page *page)
{
	struct entry *entry;
	s32 result;

	/* A huge page is many, and this is asked for the first alone. */
	if (PageTransHuge(page) || offset >> 4 > U32_MAX) {
		declined++;
		return -1;
	}
	spin_lock(&lock);
	entry = next_entry(TMEM_PUT_PAGE);
	name(entry, type, offset);
	entry->op.u.gen.cmfn = page_to_pfn(page);
	result = ask(entry);
	record(EVENT_STORE, type, offset, result, 0);
	puts++;
	if (result != 1)
		refused++;
	spin_unlock(&lock);
	return result == 1 ? 0 : -1;
}

/* Asked only for a page that was stored and not invalidated since. */
static int load(unsigned int type, pgoff_t offset, struct page *page)
{
	u64 begun = 0;

	for (;;) {
		struct entry *entry;
		s32 result;

		spin_lock(&lock);
		entry = next_entry(TMEM_GET_PAGE);
		name(entry, type, offset);
		entry->op.u.gen.cmfn = virt_to_phys(bounce) >> PAGE_SHIFT;
		result = ask(entry);
		gets++;
		if (begun)
			again++;
		if (result == 1) {
			void *to = kmap_atomic(page);

			copy_page(to, bounce);
			kunmap_atomic(to);
			record(EVENT_LOAD, type, offset, result, 0);
		}
		spin_unlock(&lock);
		if (result == 1)
			return 0;
		if (!begun) {
			begun = now_ms();
			pr_warn("the host answers %d for a page that it took: asking again for %u ms\n", result, patience_ms);
		}
		if (now_ms() - begun >= patience_ms)
			panic("tmem_guest: the host has lost the page at offset %lu of swap area %u (it answers %d)\n", offset, type,
			      result);
		msleep(10);
	}
}

/* Under a spin lock of the kernel's: nothing here may sleep. */
static void invalidate_page(unsigned int type, pgoff_t offset)
{
	struct entry *entry;

	if (offset >> 4 > U32_MAX)
		return;
	spin_lock(&lock);
	entry = next_entry(TMEM_FLUSH_PAGE);
	name(entry, type, offset);
	page_flushes++;
	post(entry);
	record(EVENT_INVALIDATE, type, offset, 0, 0);
	spin_unlock(&lock);
}

static void invalidate_area(unsigned int type)
{
	int low;

	spin_lock(&lock);
	for (low = 15; low >= 0; low--) {
		struct entry *entry = next_entry(TMEM_FLUSH_OBJECT);

		name(entry, type, low);
		object_flushes++;
		ask(entry);
	}
	record(EVENT_AREA, type, 0, 0, 0);
	hand_over();
	spin_unlock(&lock);
}

static struct frontswap_ops operations = {
	.init = frontswap_init_area,
	.store = store,
	.load = load,
	.invalidate_page = invalidate_page,
	.invalidate_area = invalidate_area,
};

/* A page of a file: the file's key as the file system makes it, 24 bytes as Xen's objects have. */
static void clean_name(struct entry *entry, int of_pool, struct cleancache_filekey key)
{
	BUILD_BUG_ON(sizeof(key) != sizeof(entry->op.u.gen.oid));
	entry->op.pool_id = of_pool;
	memcpy(entry->op.u.gen.oid, &key, sizeof(key));
}

static u64 folded(struct cleancache_filekey key)
{
	u64 words[3];

	memcpy(words, &key, sizeof(words));
	return words[0] ^ words[1] ^ words[2];
}

static int clean_new_pool(u32 flags, const uuid_t *uuid)
{
	struct entry *entry;
	s32 result;

	spin_lock(&lock);
	entry = next_entry(TMEM_NEW_POOL);
	entry->op.u.creat.flags = flags | TMEM_SPEC_VERSION << TMEM_SPEC_VERSION_SHIFT;
	if (uuid != NULL)
		memcpy(entry->op.u.creat.uuid, uuid, sizeof(entry->op.u.creat.uuid));
	result = ask(entry);
	pools++;
	spin_unlock(&lock);
	/* Less has meanings of its own. */
	return result < 0 ? -1 : result;
}

static int clean_init_fs(size_t page_bytes)
{
	return clean_new_pool(0, NULL);
}

static int clean_init_shared_fs(uuid_t *uuid, size_t page_bytes)
{
	return clean_new_pool(TMEM_POOL_SHARED, uuid);
}

static int clean_get(int of_pool, struct cleancache_filekey key, pgoff_t index, struct page *page)
{
	struct entry *entry;
	bool hit;

	/* Nothing that large was ever put. */
	if (index > U32_MAX) {
		clean_misses++;
		return -1;
	}
	spin_lock(&lock);
	entry = next_entry(TMEM_GET_PAGE);
	clean_name(entry, of_pool, key);
	entry->op.u.gen.index = index;
	entry->op.u.gen.cmfn = virt_to_phys(bounce) >> PAGE_SHIFT;
	hit = ask(entry) == 1;
	gets++;
	if (hit) {
		void *to = kmap_atomic(page);

		copy_page(to, bounce);
		kunmap_atomic(to);
		clean_hits++;
	} else {
		clean_misses++;
	}
	record(EVENT_CLEAN_GET, folded(key), index, hit, of_pool);
	spin_unlock(&lock);
	return hit ? 0 : -1;
}

/* The kernel wants no answer, and frees the page: a copy of it can wait in the ring. */
static void clean_put(int of_pool, struct cleancache_filekey key, pgoff_t index, struct page *page)
{
	struct entry *entry;

	if (index > U32_MAX) {
		clean_puts++;
		return;
	}
	spin_lock(&lock);
	entry = next_entry(TMEM_PUT_PAGE);
	clean_name(entry, of_pool, key);
	entry->op.u.gen.index = index;
	if (posted) {
		void *copy = frames + (head % RING_ENTRIES) * PAGE_SIZE;
		void *from = kmap_atomic(page);

		copy_page(copy, from);
		kunmap_atomic(from);
		entry->op.u.gen.cmfn = virt_to_phys(copy) >> PAGE_SHIFT;
	} else {
		entry->op.u.gen.cmfn = page_to_pfn(page);
	}
	puts++;
	clean_puts++;
	post(entry);
	record(EVENT_CLEAN_PUT, folded(key), index, 0, of_pool);
	spin_unlock(&lock);
}

static void clean_invalidate_page(int of_pool, struct cleancache_filekey key, pgoff_t index)
{
	struct entry *entry;

	spin_lock(&lock);
	clean_page_flushes++;
	if (index <= U32_MAX) {
		entry = next_entry(TMEM_FLUSH_PAGE);
		clean_name(entry, of_pool, key);
		entry->op.u.gen.index = index;
		page_flushes++;
		post(entry);
		record(EVENT_CLEAN_INVALIDATE, folded(key), index, 0, of_pool);
	}
	spin_unlock(&lock);
}

static void clean_invalidate_inode(int of_pool, struct cleancache_filekey key)
{
	struct entry *entry;

	spin_lock(&lock);
	entry = next_entry(TMEM_FLUSH_OBJECT);
	clean_name(entry, of_pool, key);
	object_flushes++;
	post(entry);
	record(EVENT_CLEAN_INODE, folded(key), 0, 0, of_pool);
	spin_unlock(&lock);
}

static void clean_invalidate_fs(int of_pool)
{
	struct entry *entry;

	spin_lock(&lock);
	entry = next_entry(TMEM_DESTROY_POOL);
	entry->op.pool_id = of_pool;
	pools++;
	ask(entry);
	record(EVENT_CLEAN_FS, 0, 0, 0, of_pool);
	spin_unlock(&lock);
}

static const struct cleancache_ops clean_operations = {
	.init_fs = clean_init_fs,
	.init_shared_fs = clean_init_shared_fs,
	.get_page = clean_get,
	.put_page = clean_put,
	.invalidate_page = clean_invalidate_page,
	.invalidate_inode = clean_invalidate_inode,
	.invalidate_fs = clean_invalidate_fs,
};

/* A program that has the device open: its address space is watched until it exits. */
struct watch {
	struct mmu_notifier notifier;
	u32 who;
};

static void watched(struct mmu_notifier *notifier, u16 kind, unsigned long first, unsigned long end, s16 detail)
{
	struct watch *watch = container_of(notifier, struct watch, notifier);

	spin_lock(&lock);
	record(kind, first, end, detail, watch->who);
	spin_unlock(&lock);
}

static int watch_start(struct mmu_notifier *notifier, const struct mmu_notifier_range *range)
{
	watched(notifier, EVENT_START, range->start, range->end, range->event);
	return 0;
}

static void watch_end(struct mmu_notifier *notifier, const struct mmu_notifier_range *range)
{
	watched(notifier, EVENT_END, range->start, range->end, range->event);
}

static void watch_range(struct mmu_notifier *notifier, struct mm_struct *mm, unsigned long first, unsigned long end)
{
	watched(notifier, EVENT_RANGE, first, end, 0);
}

static void watch_change(struct mmu_notifier *notifier, struct mm_struct *mm, unsigned long address, pte_t pte)
{
	watched(notifier, EVENT_CHANGE_PTE, address, address + PAGE_SIZE, 0);
}

static int watch_young(struct mmu_notifier *notifier, struct mm_struct *mm, unsigned long first, unsigned long end)
{
	watched(notifier, EVENT_YOUNG, first, end, 0);
	return 0;
}

static void watch_release(struct mmu_notifier *notifier, struct mm_struct *mm)
{
	watched(notifier, EVENT_RELEASE, 0, 0, 0);
}

static const struct mmu_notifier_ops watch_operations = {
	.release = watch_release,
	.invalidate_range_start = watch_start,
	.invalidate_range_end = watch_end,
	.invalidate_range = watch_range,
	.change_pte = watch_change,
	.clear_flush_young = watch_young,
};

static int trace_open(struct inode *inode, struct file *file)
{
	static u32 programs;
	struct watch *watch = kzalloc(sizeof(*watch), GFP_KERNEL);
	int result;

	if (watch == NULL)
		return -ENOMEM;
	watch->notifier.ops = &watch_operations;
	spin_lock(&lock);
	watch->who = ++programs;
	record(EVENT_REGISTER, 0, 0, 0, watch->who);
	spin_unlock(&lock);
	result = mmu_notifier_register(&watch->notifier, current->mm);
	if (result != 0) {
		kfree(watch);
		return result;
	}
	file->private_data = watch;
	return 0;
}

/* Of a program that exits: its address space has been released before. */
static int trace_release(struct inode *inode, struct file *file)
{
	struct watch *watch = file->private_data;

	mmu_notifier_unregister(&watch->notifier, watch->notifier.mm);
	kfree(watch);
	spin_lock(&lock);
	hand_over();
	spin_unlock(&lock);
	return 0;
}

static const struct file_operations trace_file = {
	.owner = THIS_MODULE,
	.open = trace_open,
	.release = trace_release,
};

static struct miscdevice trace_device = { .minor = MISC_DYNAMIC_MINOR, .name = "tmem_trace", .fops = &trace_file };

static void free_frames(void)
{
	free_pages((unsigned long)frames, FRAMES_ORDER);
	free_pages((unsigned long)ring, RING_ORDER);
}

static int __init tmem_guest_init(void)
{
	struct entry *entry;
	int result;

	BUILD_BUG_ON(sizeof(struct tmem_op) != 56 || sizeof(struct entry) != 64 || offsetof(struct ring, tail) != 64 ||
		     RING_ENTRIES != 1 << FRAMES_ORDER);
	/* What QEMU's debug console answers when it is read. */
	if (inb(port) != 0xe9) {
		pr_err("there is no doorbell at port 0x%x\n", port);
		return -ENODEV;
	}
	ring = (void *)__get_free_pages(GFP_KERNEL | __GFP_ZERO, RING_ORDER);
	if (ring == NULL)
		return -ENOMEM;
	if (IS_ENABLED(CONFIG_CLEANCACHE)) {
		frames = (void *)__get_free_pages(GFP_KERNEL, FRAMES_ORDER);
		if (frames == NULL) {
			free_frames();
			return -ENOMEM;
		}
	}
	entries = (void *)ring + PAGE_SIZE;
	bounce = (void *)ring + 2 * PAGE_SIZE;
	events = (void *)ring + 3 * PAGE_SIZE;
	memcpy(ring->magic, "tmemring", sizeof(ring->magic));
	ring->version = RING_VERSION;
	ring->entries = RING_ENTRIES;
	smp_mb();
	say_where();
	spin_lock(&lock);
	pool = 0;
	entry = next_entry(TMEM_NEW_POOL);
	entry->op.u.creat.flags = TMEM_POOL_PERSIST | TMEM_SPEC_VERSION << TMEM_SPEC_VERSION_SHIFT;
	pool = ask(entry);
	pools++;
	spin_unlock(&lock);
	if (pool < 0) {
		pr_err("the host gives no pool (it answers %d)\n", pool);
		free_frames();
		return -EIO;
	}
	result = trace ? misc_register(&trace_device) : 0;
	if (result != 0) {
		pr_err("there is no device for traces: %d\n", result);
		free_frames();
		return result;
	}
	frontswap_register_ops(&operations);
	if (IS_ENABLED(CONFIG_CLEANCACHE) && cleancache_register_ops(&clean_operations) != 0)
		pr_warn("somebody else has cleancache\n");
	pr_info("frontswap is pool %d of the host\n", pool);
	return 0;
}

/* There is no way to take frontswap operations away again: the module stays. */
module_init(tmem_guest_init);
MODULE_DESCRIPTION("Frontswap and cleancache over Xen's tmem, in a process of the host");
MODULE_LICENSE("Dual MIT/GPL");
