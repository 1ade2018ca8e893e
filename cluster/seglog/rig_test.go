package seglog

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
	"firn.io/firn/internal/vfs"
)

// fataler is what tests and rapid have in common.
type fataler interface {
	Fatalf(format string, args ...any)
	Helper()
}

// rig is a log on a simulated disk, with the model of what it must hold.
type rig struct {
	t        fataler
	fs       *vfs.Sim
	world    *loop.World
	loop     *loop.Sim
	log      *Log
	sb       Superblock
	segs     int
	reps     map[ReplicaKey]*modelReplica
	keys     []ReplicaKey // of reps, in the order of creation
	index    *modelIndex
	failed   error
	logged   []string
	damaged  bool // damage is expected
	replicas int
}

const rigDir = "/node/disk"

// modelReplica remembers the state after each write that was not acknowledged
// when the log was last known.
type modelReplica struct {
	key    ReplicaKey
	states []modelState // [0] is durable for sure
	writes []Write      // writes[i] leads from states[i] to states[i+1]
	acked  int          // writes that were acknowledged
	made   bool         // its creation was acknowledged
	gone   bool         // its removal was asked for
}

type modelState struct {
	trunc EntryID
	terms []uint64 // of entries trunc.Index+1...
	hard  HardState
}

func (s *modelState) last() uint64 { return s.trunc.Index + uint64(len(s.terms)) }

func (s *modelState) term(i uint64) uint64 {
	if i == s.trunc.Index {
		return s.trunc.Term
	}
	return s.terms[i-s.trunc.Index-1]
}

func (s *modelState) after(w *Write) modelState {
	n := modelState{s.trunc, slices.Clone(s.terms), s.hard}
	if t := w.Truncate; t != nil {
		if t.Index > n.last() || n.term(t.Index) != t.Term {
			n.terms = nil
		} else {
			n.terms = n.terms[t.Index-n.trunc.Index:]
		}
		n.trunc = *t
	}
	for _, e := range w.Entries {
		n.terms = append(n.terms[:e.Index-n.trunc.Index-1], e.Term)
	}
	if w.HardState != nil {
		n.hard = *w.HardState
	}
	return n
}

func (m *modelReplica) now() *modelState { return &m.states[len(m.states)-1] }

// content is what the payload of an entry holds; blocks may be 0.
func content(key ReplicaKey, id EntryID, n int) []byte {
	p := make([]byte, n)
	r := rand.NewPCG(uint64(key.Group)<<32|uint64(key.Replica), id.Index<<20|id.Term)
	for i := 0; i+8 <= n; i += 8 {
		le.PutUint64(p[i:], r.Uint64())
	}
	return p
}

// shape of an entry, made from its id alone: where it writes and how much.
func shape(key ReplicaKey, id EntryID) (at block.Index, bytes, data int) {
	r := rand.New(rand.NewPCG(uint64(key.Group)*7919+uint64(key.Replica), id.Index*31+id.Term))
	at = block.Index(r.IntN(48))
	switch r.IntN(6) {
	case 0:
		bytes = 0
	case 1:
		bytes = 4 * block.Size
	default:
		bytes = block.Size
	}
	data = 24 + r.IntN(150)
	if r.IntN(40) == 0 {
		data = 5000
	}
	return at, bytes, data
}

func entryData(key ReplicaKey, id EntryID) []byte {
	_, n, size := shape(key, id)
	d := make([]byte, size)
	le.PutUint64(d, id.Index)
	le.PutUint64(d[8:], id.Term)
	le.PutUint32(d[16:], uint32(n))
	return d
}

func makeEntry(key ReplicaKey, id EntryID) Entry {
	e := Entry{Term: id.Term, Index: id.Index, Data: entryData(key, id)}
	if _, n, _ := shape(key, id); n > 0 {
		e.Payload = payload.Copy(content(key, id, n))
	}
	return e
}

// modelIndex points at blocks as an index does: memory, and a durable checkpoint.
type modelIndex struct {
	now, durable checkpoint
	rejected     int
	moved        int
	asked        int
}

type checkpoint struct {
	blocks  map[blockKey]blockAt
	applied map[ReplicaKey]EntryID
}

type blockKey struct {
	key ReplicaKey
	at  block.Index
}

type blockAt struct {
	loc     Location
	id      EntryID
	k       int // block of the entry
	removed bool
}

func newCheckpoint() checkpoint {
	return checkpoint{map[blockKey]blockAt{}, map[ReplicaKey]EntryID{}}
}

func (c *checkpoint) clone() checkpoint {
	n := newCheckpoint()
	for k, v := range c.blocks {
		n.blocks[k] = v
	}
	for k, v := range c.applied {
		n.applied[k] = v
	}
	return n
}

func (x *modelIndex) LiveBlocks(seg SegmentID) int {
	live := map[uint16]bool{}
	for _, c := range []*checkpoint{&x.now, &x.durable} {
		for _, b := range c.blocks {
			if b.loc.Segment == seg {
				live[b.loc.Block] = true
			}
		}
	}
	return len(live)
}

func (x *modelIndex) LiveTotal() (n int64) {
	seen := map[SegmentID]bool{}
	for _, c := range []*checkpoint{&x.now, &x.durable} {
		for _, b := range c.blocks {
			if !seen[b.loc.Segment] {
				seen[b.loc.Segment] = true
				n += int64(x.LiveBlocks(b.loc.Segment))
			}
		}
	}
	return n
}

func (x *modelIndex) Live(seg SegmentID, b uint16) bool {
	for _, at := range x.now.blocks {
		if at.loc == (Location{seg, b}) {
			return true
		}
	}
	return false
}

func (x *modelIndex) Describe(key ReplicaKey, id EntryID, data []byte) (Record, bool) {
	if id.Index != le.Uint64(data) || id.Term != le.Uint64(data[8:]) {
		panic("described with another entry's data")
	}
	at, n, _ := shape(key, id)
	return Record{Volume: block.VolumeID{byte(key.Group)}, Block: at, Written: block.MakeVersion(uint16(id.Term), id.Index),
		CRCs: block.AppendCRCs(nil, content(key, id, n))}, true
}

func (x *modelIndex) ApplyMoves(moves []Move) {
	for _, m := range moves {
		for i := range m.CRCs {
			k := blockKey{m.Key, m.Block + block.Index(i)}
			from := Location{m.From.Segment, m.From.Block + uint16(i)}
			if b, ok := x.now.blocks[k]; ok && b.loc == from {
				b.loc = Location{m.To.Segment, m.To.Block + uint16(i)}
				x.now.blocks[k] = b
				x.moved++
			} else {
				x.rejected++
			}
		}
	}
}

func (x *modelIndex) NeedSpace()               { x.asked++ }
func (x *modelIndex) Damaged(Record, Location) {}

func newRig(t fataler, seed uint64, segmentBytes int64, segs int) *rig {
	r := &rig{t: t, fs: vfs.NewSim(0), segs: segs, reps: map[ReplicaKey]*modelReplica{},
		sb:    Superblock{Cluster: block.ClusterID{1}, Disk: block.DiskID{2}, Node: 3, SegmentBytes: segmentBytes, Created: "today"},
		index: &modelIndex{now: newCheckpoint(), durable: newCheckpoint()}, world: loop.NewWorld(seed)}
	if err := Format(r.fs, rigDir, r.sb); err != nil {
		t.Fatalf("format: %v", err)
	}
	return r
}

func (r *rig) options() Options {
	return Options{CapacityBytes: int64(r.segs) * r.sb.SegmentBytes,
		Applied: func(k ReplicaKey) (EntryID, bool) { id, ok := r.index.durable.applied[k]; return id, ok },
		Live:    func(s SegmentID, _ uint64) bool { return r.index.LiveBlocks(s) > 0 },
		Failed:  func(err error) { r.failed = err },
		Logf:    func(f string, a ...any) { r.logged = append(r.logged, fmt.Sprintf(f, a...)) }}
}

func (r *rig) tryOpen() error {
	r.index.now = r.index.durable.clone()
	r.failed = nil
	log, err := Open(r.fs, rigDir, r.sb, r.options())
	if err != nil {
		return err
	}
	r.log, r.loop = log, r.world.NewLoop(nil)
	return nil
}

// open recovers the log, checks it against the model and starts it.
func (r *rig) open() {
	r.t.Helper()
	if err := r.tryOpen(); err != nil {
		r.t.Fatalf("open: %v", err)
	}
	r.check()
	r.start()
}

func (r *rig) start() {
	r.loop.Post(func() { r.log.Start(r.loop, r.index) })
	r.world.RunFor(0)
	for _, k := range r.keys {
		r.apply(k)
	}
}

// check compares what was recovered with the model and makes it the model's.
func (r *rig) check() {
	r.t.Helper()
	if d := r.log.Damaged(); len(d) > 0 && !r.damaged {
		r.t.Fatalf("damage without rot: %v (%v)", d, r.logged[max(0, len(r.logged)-6):])
	}
	for _, k := range r.keys {
		m := r.reps[k]
		rep := r.log.Replica(k)
		if rep == nil {
			if m.made && !m.gone {
				r.t.Fatalf("%v is gone (%v)", k, r.logged)
			}
			delete(r.reps, k)
			continue
		}
		if rep.Damaged() != "" {
			delete(r.reps, k)
			continue
		}
		r.checkReplica(m, rep)
	}
	r.keys = slices.DeleteFunc(r.keys, func(k ReplicaKey) bool {
		_, ok := r.reps[k]
		if !ok {
			r.index.forget(k)
		}
		return !ok
	})
}

func (x *modelIndex) forget(k ReplicaKey) {
	for _, c := range []*checkpoint{&x.now, &x.durable} {
		delete(c.applied, k)
		for b := range c.blocks {
			if b.key == k {
				delete(c.blocks, b)
			}
		}
	}
}

func (r *rig) checkReplica(m *modelReplica, rep *Replica) {
	r.t.Helper()
	applied := r.index.durable.applied[m.key]
	var candidates []modelState
	for i := m.acked; i < len(m.states); i++ {
		candidates = append(candidates, m.states[i])
		if i < len(m.writes) { // a prefix of its entries, without its hard state
			w := m.writes[i]
			w.HardState = nil
			for n := range w.Entries {
				part := w
				part.Entries = w.Entries[:n]
				candidates = append(candidates, m.states[i].after(&part))
			}
		}
	}
	// A truncation may overtake what waits for a free segment.
	for _, s := range slices.Clone(candidates) {
		for _, w := range m.writes[m.acked:] {
			if t := w.Truncate; t != nil && t.Index > s.trunc.Index && t.Index <= s.last() && s.term(t.Index) == t.Term {
				candidates = append(candidates, s.after(&Write{Truncate: t}))
			}
		}
	}
	for k := len(candidates) - 1; k >= 0; k-- {
		if s := candidates[k]; s.equal(rep, applied) {
			s.hard = rep.HardState()
			m.states, m.writes, m.acked, m.made, m.gone = []modelState{s}, nil, 0, true, false
			r.readBack(m, rep)
			return
		}
	}
	r.t.Fatalf("%v came back as %d..%d hard %+v trunc %+v, applied %+v; none of %d states from %+v to %+v (%v)", m.key, rep.FirstIndex(), rep.LastIndex(),
		rep.HardState(), rep.Truncated(), applied, len(candidates), candidates[0], *m.now(), r.logged)
}

func (s *modelState) equal(rep *Replica, applied EntryID) bool {
	hard := s.hard
	hard.Commit = max(hard.Commit, applied.Index)
	hard.Term = max(hard.Term, applied.Term)
	if rep.Truncated() != s.trunc || rep.LastIndex() != s.last() || rep.HardState() != hard || rep.Durable() != s.last() {
		return false
	}
	for i := s.trunc.Index; i <= s.last(); i++ {
		if term, ok := rep.Term(i); !ok || term != s.term(i) {
			return false
		}
	}
	return true
}

// readBack reads every entry and compares it.
func (r *rig) readBack(m *modelReplica, rep *Replica) {
	r.t.Helper()
	for i := rep.FirstIndex(); i <= rep.Durable() && i <= rep.LastIndex(); {
		entries, err := rep.Read(i, rep.LastIndex()+1, 30000, true)
		if err != nil || len(entries) == 0 {
			r.t.Fatalf("read entry %d of %v: %v", i, m.key, err)
		}
		for _, e := range entries {
			id := EntryID{i, m.now().term(i)}
			_, n, _ := shape(m.key, id)
			var got []byte
			if e.Payload != nil {
				got = e.Payload.Bytes()
			}
			if e.Index != id.Index || e.Term != id.Term || !bytes.Equal(e.Data, entryData(m.key, id)) || !bytes.Equal(got, content(m.key, id, n)) {
				r.t.Fatalf("entry %+v of %v came back as another (%d, %d, %d bytes)", id, m.key, e.Index, e.Term, len(got))
			}
			if e.Payload != nil {
				e.Payload.Release()
			}
			i++
		}
	}
}

func (r *rig) create(k ReplicaKey) {
	m := &modelReplica{key: k, states: []modelState{{trunc: EntryID{10, 5}, hard: HardState{5, 0, 10}}}}
	r.reps[k] = m
	r.keys = append(r.keys, k)
	r.index.now.applied[k] = EntryID{10, 5}
	r.loop.Post(func() {
		r.log.Create(k, EntryID{10, 5}, HardState{5, 0, 10}, func(err error) { m.made = m.made || err == nil })
	})
}

func (r *rig) remove(k ReplicaKey) {
	r.reps[k].gone = true
	r.index.forget(k)
	r.loop.Post(func() {
		r.log.Remove(k, func(err error) {
			if err == nil {
				delete(r.reps, k)
			}
		})
	})
	r.keys = slices.DeleteFunc(r.keys, func(x ReplicaKey) bool { return x == k })
}

// append adds n entries from index first on in a term.
func (r *rig) append(k ReplicaKey, first, term uint64, n int) {
	var w Write
	for i := range n {
		w.Entries = append(w.Entries, makeEntry(k, EntryID{first + uint64(i), term}))
	}
	r.write(k, w)
}

func (r *rig) write(k ReplicaKey, w Write) {
	m := r.reps[k]
	m.states = append(m.states, m.now().after(&w))
	m.writes = append(m.writes, w)
	r.loop.Post(func() {
		rep := r.log.Replica(k)
		if rep == nil && r.log.Err() != nil {
			return // it was to be created after the power went off
		}
		rep.Append(w, func(err error) {
			if err == nil {
				m.acked++
			}
		})
		for _, e := range w.Entries {
			if e.Payload != nil {
				e.Payload.Release()
			}
		}
	})
}

// apply points the index at all durable entries above the applied one.
func (r *rig) apply(k ReplicaKey) {
	rep := r.log.Replica(k)
	m := r.reps[k]
	if rep == nil || m == nil || m.gone {
		return
	}
	from, ok := r.index.now.applied[k]
	if !ok {
		from = EntryID{10, 5}
	}
	// Only what no later write can discard: the model commits what is acknowledged.
	upto := min(rep.Durable(), m.states[m.acked].last())
	for _, w := range m.writes[m.acked:] {
		if len(w.Entries) > 0 {
			upto = min(upto, w.Entries[0].Index-1)
		}
	}
	for i := from.Index + 1; i <= upto; i++ {
		loc, n, ok := rep.Locate(i)
		if !ok {
			r.t.Fatalf("entry %d of %v has no place", i, k)
		}
		term, _ := rep.Term(i)
		at, _, _ := shape(k, EntryID{i, term})
		for b := range n / block.Size {
			r.index.now.blocks[blockKey{k, at + block.Index(b)}] = blockAt{loc: Location{loc.Segment, loc.Block + uint16(b)}, id: EntryID{i, term}, k: b}
		}
		r.index.now.applied[k] = EntryID{i, term}
	}
}

func (r *rig) checkpoint() {
	r.index.durable = r.index.now.clone()
	r.loop.Post(func() { r.log.Poke() })
}

// truncate forgets what the durable checkpoint holds, but for keep entries.
func (r *rig) truncate(k ReplicaKey, keep uint64) {
	m := r.reps[k]
	a, ok := r.index.durable.applied[k]
	s := m.now()
	if !ok || a.Index < s.trunc.Index+keep {
		return
	}
	t := EntryID{a.Index - keep, 0}
	t.Term = s.term(t.Index)
	r.write(k, Write{Truncate: &t})
}

// verify reads every block that the index points at.
func (r *rig) verify() {
	r.t.Helper()
	for _, c := range []*checkpoint{&r.index.now, &r.index.durable} {
		for k, b := range c.blocks {
			p := payload.New(block.Size)
			if err := r.log.ReadBlocks(b.loc, p.Bytes()); err != nil {
				r.t.Fatalf("read block %v at %v: %v", k, b.loc, err)
			}
			_, n, _ := shape(k.key, b.id)
			if !bytes.Equal(p.Bytes(), content(k.key, b.id, n)[b.k*block.Size:(b.k+1)*block.Size]) {
				r.t.Fatalf("block %v of entry %v is not at %v", k, b.id, b.loc)
			}
			p.Release()
		}
	}
}

func (r *rig) run(d time.Duration) { r.world.RunFor(d) }

var errPower = errors.New("power is off")

// killAt switches the power off at the n-th call of the disk from now on.
func (r *rig) killAt(n int) {
	fs := r.fs
	fs.SetRule(func(vfs.Call) error {
		if n == 0 {
			fs.Kill(errPower)
		}
		n--
		return nil
	})
}

// dead tells whether the power went off.
func (r *rig) dead() bool {
	_, err := r.fs.List("/")
	return err != nil
}

// crash loses the power and everything that was not synced, but for what rnd
// draws.
func (r *rig) crash(rnd *rand.Rand) {
	r.loop.Kill()
	r.fs = r.fs.Crash(rnd)
}

func (r *rig) close() {
	r.t.Helper()
	closed := false
	r.loop.Post(func() {
		r.log.Close(func(err error) {
			if err != nil {
				r.t.Fatalf("close: %v", err)
			}
			closed = true
		})
	})
	r.run(5 * time.Second)
	if !closed {
		r.t.Fatalf("the log does not close: %+v", r.log.Stats())
	}
	r.loop.Kill()
}
