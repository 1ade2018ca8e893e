package scsi

import (
	"context"
	"encoding/binary"
	"slices"
	"sync"
	"sync/atomic"

	"firn.io/firn/internal/block"
)

// Nexus is an initiator port that talks to a target port (I_T nexus): one
// session. It is valid for all units that it reaches.
type Nexus struct {
	// Initiator is the iSCSI name and the ISID of the initiator port, as its
	// TransportID has them: "iqn.1993-08.org.debian:01:abc,i,0x00023d000001".
	Initiator string
	// Port is the relative target port identifier, Group its port group.
	Port, Group uint16
	// TargetName is the iSCSI name of the target, for its SCSI name string.
	TargetName string
	// Tag is the target portal group tag.
	Tag uint16
}

// Config is what a Unit is made of.
type Config struct {
	Device block.Device
	// Store keeps the persistent reservations; nil keeps them in memory.
	Store Store
	// Revision is shown by INQUIRY, at most 4 characters.
	Revision string
}

// Unit is a logical unit. mu guards what is below it; it is not held while the
// device is at work.
type Unit struct {
	dev      block.Device
	memory   block.MemoryReader // may be nil
	prefetch block.Prefetcher   // may be nil
	revision string
	res      *reservations
	// compare makes COMPARE AND WRITE atomic among its like; overlapping writes
	// and reads are ordered by the device.
	compare sync.RWMutex

	// Abort, if set before the unit is used, ends the tasks of the nexuses that
	// match and returns when they have ended: for PREEMPT AND ABORT by a nexus,
	// whose own task is not among them.
	Abort func(by *Nexus, match func(*Nexus) bool)

	// clean is set while no nexus has an attention and nothing is reserved: what
	// the fast path of reads looks at.
	clean atomic.Bool

	mu     sync.Mutex
	nexus  map[*Nexus]*[]Code // pending unit attentions
	mode   modeState
	copied map[*Nexus]copyResult
	stop   func()
}

// maxAttentions bounds the unit attentions that wait at one nexus.
const maxAttentions = 16

// NewUnit makes a unit of cfg.Device, which stays the caller's. ctx bounds the
// reading of the reservations.
func NewUnit(ctx context.Context, cfg Config) (*Unit, error) {
	u := &Unit{dev: cfg.Device, revision: cfg.Revision, nexus: map[*Nexus]*[]Code{}, copied: map[*Nexus]copyResult{}}
	u.memory, _ = cfg.Device.(block.MemoryReader)
	u.prefetch, _ = cfg.Device.(block.Prefetcher)
	store := cfg.Store
	if store == nil {
		store = &MemoryStore{}
	}
	var err error
	if u.res, err = loadReservations(ctx, store); err != nil {
		return nil, err
	}
	if n, ok := cfg.Device.(block.ResizeNotifier); ok {
		u.stop = n.NotifyResize(func(block.Geometry) { u.Attention(nil, attentionCapacity) })
	}
	return u, nil
}

// Close ends the unit's interest in its device.
func (u *Unit) Close() {
	if u.stop != nil {
		u.stop()
	}
}

// Device returns the device.
func (u *Unit) Device() block.Device { return u.dev }

// Attach makes the nexus known. Its first command is told first.
func (u *Unit) Attach(n *Nexus, first Code) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.nexus[n] = &[]Code{first}
	u.clean.Store(false)
}

// Detach forgets the nexus: a reservation by RESERVE goes with it, persistent
// ones stay.
func (u *Unit) Detach(n *Nexus) {
	u.res.nexusLost(n)
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.nexus, n)
	delete(u.copied, n)
	u.tidy()
}

// Attention queues a unit attention for every nexus but except.
func (u *Unit) Attention(except *Nexus, code Code) {
	u.attentionFor(code, func(n *Nexus) bool { return n != except })
}

func (u *Unit) attentionFor(code Code, wanted func(*Nexus) bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	for n, q := range u.nexus {
		if wanted(n) && !slices.Contains(*q, code) && len(*q) < maxAttentions {
			*q = append(*q, code)
		}
	}
	u.tidy()
}

// tidy recomputes clean; mu is held.
func (u *Unit) tidy() {
	clean := !u.res.any()
	for _, q := range u.nexus {
		clean = clean && len(*q) == 0
	}
	u.clean.Store(clean)
}

// takeAttention removes and returns the oldest attention of the nexus.
func (u *Unit) takeAttention(n *Nexus) (Code, bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	q := u.nexus[n]
	if q == nil || len(*q) == 0 {
		return 0, false
	}
	code := (*q)[0]
	*q = slices.Delete(*q, 0, 1)
	u.tidy()
	return code, true
}

// Reset is LOGICAL UNIT RESET: the reservation by RESERVE and changed mode
// parameters go, all nexuses are told. The transport has ended the unit's tasks
// before.
func (u *Unit) Reset() {
	u.res.reset()
	u.mu.Lock()
	u.mode = modeState{}
	u.tidy()
	u.mu.Unlock()
	u.Attention(nil, AttentionReset)
}

// Result is how a command ended. Data of a read is in In, which is the buffer
// that was given, cut or grown.
type Result struct {
	Status Status
	// Sense is set with CheckCondition.
	Sense []byte
	In    []byte
	// Wanted is how many bytes of data the command moves in the direction that it
	// has, if the initiator had offered enough: what residuals count from.
	Wanted int64
}

// Request is a command as a transport hands it over.
type Request struct {
	CDB []byte
	// Out is what the initiator sent, Offered how much it had for the command.
	Out     []byte
	Offered int64
	// In, of length 0, is where data for the initiator goes, which takes at most
	// Limit bytes.
	In    []byte
	Limit int64
}

// call is one command under way.
type call struct {
	ctx     context.Context
	u       *Unit
	n       *Nexus
	cdb     []byte
	out     []byte
	offered int64
	in      []byte
	limit   int64
	r       Result
}

// DataOut tells how many bytes of data the command takes from the initiator; 0
// also for what is no valid command.
func (u *Unit) DataOut(cdb []byte) int64 {
	c := find(cdb)
	if c == nil || c.out == nil || len(cdb) < c.length {
		return 0
	}
	return min(max(0, c.out(cdb, u.blockBytes())), MaxTransferBytes)
}

// DataIn tells how many bytes a read moves, so that its buffer can be had
// before it runs; 0 for all that is not a read, which needs maxInBytes at most.
func (u *Unit) DataIn(cdb []byte) int64 {
	if r, ok := readRange(cdb); ok {
		return min(int64(r.blocks)*u.blockBytes(), MaxTransferBytes)
	}
	return 0
}

func (u *Unit) blockBytes() int64 { return int64(u.dev.Geometry().LogicalBlockBytes) }

func (u *Unit) blocks() uint64 {
	g := u.dev.Geometry()
	return uint64(g.SizeBytes / int64(g.LogicalBlockBytes))
}

// Memory returns the data of a read that memory holds, if nothing speaks
// against answering it at once. The loan is the caller's to release.
func (u *Unit) Memory(cdb []byte) (block.Lent, bool) {
	if u.memory == nil || !u.clean.Load() {
		return nil, false
	}
	r, ok := readRange(cdb)
	if !ok || r.protect != 0 || r.blocks == 0 {
		return nil, false
	}
	bs := u.blockBytes()
	n := int64(r.blocks) * bs
	if n > MaxTransferBytes || r.lba > u.blocks() || uint64(r.blocks) > u.blocks()-r.lba {
		return nil, false
	}
	return u.memory.ReadMemory(int64(r.lba)*bs, int(n))
}

// Do runs a command. ctx may end reads; what changes data answers only when it
// is certain whether it took effect.
func (u *Unit) Do(ctx context.Context, n *Nexus, q Request) Result {
	cdb := q.CDB
	k := &call{ctx: ctx, u: u, n: n, cdb: cdb, out: q.Out, offered: q.Offered, in: q.In[:0], limit: q.Limit}
	c := find(cdb)
	switch {
	case c == nil || len(cdb) < c.length:
		code := ascInvalidOpcode
		if len(cdb) > 0 && hasActions(cdb[0]) {
			k.fail(invalidCDB(1))
			return k.r
		}
		k.fail(illegal(code))
		return k.r
	case c.flags&always == 0:
		if code, ok := u.takeAttention(n); ok {
			k.fail(attention(code))
			return k.r
		}
	}
	if u.res.conflict(n, c, cdb) {
		k.r.Status = ReservationConflict
		return k.r
	}
	if cdb[c.control()]&0x04 != 0 { // NACA: ACA is not supported
		k.fail(invalidCDB(c.control()))
		return k.r
	}
	if c.out != nil {
		k.r.Wanted = c.out(cdb, u.blockBytes())
	}
	c.run(k)
	return k.r
}

// fail ends the command with CHECK CONDITION.
func (k *call) fail(s sense) {
	k.r.Status = CheckCondition
	k.r.Sense = s.appendTo(make([]byte, 0, SenseLen), k.u.descriptorSense())
	k.r.In = nil
	if k.r.Wanted > 0 && find(k.cdb) != nil && find(k.cdb).out == nil {
		k.r.Wanted = 0
	}
}

// failed ends the command with what err of the device means.
func (k *call) failed(err error, lba uint64, write bool) {
	status, s := translate(err, lba, write)
	if status == CheckCondition {
		k.fail(s)
		return
	}
	k.r.Status = status
}

// readAt fills p with the bytes at off, in pieces that the device takes.
func (k *call) readAt(p []byte, off int64) error {
	for limit := k.u.dev.Geometry().MaxBytes; len(p) > 0; {
		n := min(len(p), limit)
		if err := k.u.dev.ReadAt(k.ctx, p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// writeAt writes p at off, in pieces that the device takes: it is durable on
// return.
func (k *call) writeAt(p []byte, off int64, f block.Flags) error {
	for limit := k.u.dev.Geometry().MaxBytes; len(p) > 0; {
		n := min(len(p), limit)
		if err := k.u.dev.WriteAt(k.ctx, p[:n], off, f); err != nil {
			return err
		}
		p, off = p[n:], off+int64(n)
	}
	return nil
}

// answer ends the command with p as data, cut to what the CDB allocates.
func (k *call) answer(p []byte, allocated uint64) {
	if uint64(len(p)) > allocated {
		p = p[:allocated]
	}
	k.r.Wanted = int64(len(p))
	if int64(len(p)) > k.limit {
		p = p[:k.limit]
	}
	k.r.In = append(k.in, p...)
}

// list returns the parameter list of n bytes that the CDB announces, as far as
// it came.
func (k *call) list(n uint64) []byte { return k.out[:min(uint64(len(k.out)), n)] }

func be16(p []byte) uint16 { return binary.BigEndian.Uint16(p) }
func be32(p []byte) uint32 { return binary.BigEndian.Uint32(p) }
func be64(p []byte) uint64 { return binary.BigEndian.Uint64(p) }
