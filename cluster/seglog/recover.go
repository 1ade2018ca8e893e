package seglog

import (
	"cmp"
	"errors"
	"fmt"
	"path"
	"slices"
	"sort"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
	"firn.io/firn/internal/vfs"
)

// voidSkip is how many numbers a recovery leaves out: more batches than can
// have been in flight at a crash.
const voidSkip = 64

// maxVoidSegments bounds the segments that a recovery names one by one as those
// that may hold what it voids: a state table lists them until each was used again.
const maxVoidSegments = 64

// minSegments is what a log needs: an open one per stream, their successors,
// and room to collect.
const minSegments = 8

// recovery rebuilds the state of a log from its segments.
//
// It starts at the newest state table at the head of a segment: that names the
// segments with claims, and is the state of every replica. Those segments and
// the ones that were open are read from header to header, in the order of their
// batches: what is older than the table adds entries to the state, what is
// newer changes it.
//
// At most one batch was in flight at the crash, the one after the last valid
// one. What breaks a chain before the place where its stream is known to have
// been is rot; at that place it is a torn write or nothing (L2).
type recovery struct {
	l     *Log
	heads map[SegmentID]header // valid batches at block 0
	table batch                // the newest state table at a head
	voids []void
	reps  map[ReplicaKey]*rebuilt

	durable uint64 // the highest number that any header says was synced
	last    header // of the newest valid batch
	rots    []rot
	foreign error // a batch of another format was found: nothing may be written
	// keptBytes is what Log.kept holds.
	keptBytes int
	scans     []*scan
}

// scan is what was found in one segment.
type scan struct {
	seg    *segment
	stream uint8
	sealed bool
	broken bool   // rot was found: not to be continued
	end    uint32 // where its chain ends
	last   header // its last batch that counts
	held   *batch // the one after, not replayed
}

// rot is a batch, or several, that were durable and cannot be read.
type rot struct {
	segment SegmentID
	block   uint32
	before  uint64 // number of the next batch that can be read
}

// rebuilt is a replica during recovery. slots[i] is entry base+1+i; a slot
// without segment is missing.
type rebuilt struct {
	key   ReplicaKey
	base  uint64
	slots []slot
	terms []uint64
	hard  HardState
	trunc EntryID
	last  EntryID
	cover uint64 // number of the newest batch that told the whole state
	gap   string
}

// Open recovers the log in dir. It blocks; on return all that it counts as
// written is durable, what it dropped can never come back (L3), and a cut is
// logged. The caller holds the folder's lock. Kinds: Invalid (capacity too
// small), NoSpace, Corrupt, Unavailable when the disk was marked failed.
func Open(fs vfs.FS, dir string, sb Superblock, o Options) (*Log, error) {
	if why, failed, err := FailedReason(fs, dir, sb); err != nil {
		return nil, err
	} else if failed {
		return nil, block.Errorf(block.Unavailable, "disk %v in %s has failed and must be replaced: %s", sb.Disk, dir, why)
	}
	l := &Log{fs: fs, dir: dir, sb: sb, opt: o, maxSegments: int(min(o.CapacityBytes/sb.SegmentBytes, 1<<31)),
		replicas: make(map[ReplicaKey]*Replica), kept: make(kept), claimed: make(map[SegmentID]*segment)}
	if l.maxSegments < minSegments {
		return nil, block.Errorf(block.Invalid, "a disk of %d bytes is too small: it needs at least %d segments of %d bytes", o.CapacityBytes, minSegments, sb.SegmentBytes)
	}
	l.initWriter()
	r := &recovery{l: l, heads: make(map[SegmentID]header), reps: make(map[ReplicaKey]*rebuilt)}
	err := r.run()
	if err == nil {
		l.count()
		err = l.cut(r)
	}
	if err != nil {
		for _, s := range l.segs {
			if s.file != nil {
				s.file.Close()
			}
		}
		return nil, block.Wrap(block.KindOf(err), err, "open the log of disk %v in %s", sb.Disk, dir)
	}
	return l, nil
}

func (r *recovery) run() error {
	if err := r.openSegments(); err != nil {
		return err
	}
	if err := r.findTable(); err != nil {
		return err
	}
	if r.table.number > 0 {
		r.begin()
		if err := r.scanAll(); err != nil {
			return err
		}
	}
	if r.table.number == 0 && len(r.l.opt.Known) > 0 {
		return block.Errorf(block.Corrupt, "the index of this disk holds replicas, and no segment in %s begins with a state table that can be read: "+
			"the log was removed, or has rotted. If it was moved away, put it back; otherwise replace the disk, and its replicas are filled from others. Nothing on it was changed",
			path.Join(r.l.dir, logFolder))
	}
	r.judge()
	r.settle()
	return nil
}

func (r *recovery) void(number uint64) bool {
	for _, v := range r.voids {
		if v.from <= number && number <= v.to {
			return true
		}
	}
	return false
}

// resync looks for the next valid header from a block on: of a generation (0:
// any) and with a number above after. Kind Unsupported when one is of another
// format.
func (r *recovery) resync(s *segment, from uint32, generation, after uint64) (header, bool, error) {
	const piece = 256
	l := r.l
	buf := payload.New(piece * block.Size)
	defer buf.Release()
	for at := from; at < l.segmentBlocks(); at += piece {
		n := min(piece, l.segmentBlocks()-at)
		p := buf.Bytes()[:n*block.Size]
		if readFull(s.file, p, int64(at)*block.Size) != nil {
			// A part that cannot be read: block by block, by readArea.
			clear(p)
			for i := range n {
				le.PutUint32(p[i*block.Size:], batchMagic)
			}
		}
		for i := range n {
			if le.Uint32(p[i*block.Size:]) != batchMagic {
				continue
			}
			h, area, err := l.readArea(s.file, s.id, at+i)
			if errors.Is(err, block.Unsupported) {
				return header{}, false, err
			}
			if err != nil || generation != 0 && h.generation != generation || h.number <= after || r.void(h.number) {
				continue
			}
			if _, ok := decodeRecords(&h, area); ok {
				return h, true, nil
			}
		}
	}
	return header{}, false, nil
}

// begin sets the state of the newest table.
func (r *recovery) begin() {
	r.last, r.durable = r.table.header, r.table.durable
	for i := range r.table.sections {
		s := &r.table.sections[i]
		r.reps[s.key] = &rebuilt{key: s.key, base: s.trunc.Index, hard: s.hard, trunc: s.trunc, last: EntryID{s.last, s.prev}, cover: r.table.number}
		r.reps[s.key].table(s)
	}
}

// scanAll reads the claimed and the open segments: fresh ones in the order of
// their batches, then survivors, which may hold what a cut in a fresh one voided.
func (r *recovery) scanAll() error {
	uses := append(slices.Clone(r.table.claimed), segmentUse{r.table.segment, r.table.generation})
	sort.Slice(uses, func(i, j int) bool { return uses[i].generation < uses[j].generation })
	uses = slices.CompactFunc(uses, func(a, b segmentUse) bool { return a.generation == b.generation })
	var first, later []*scan
	for _, u := range uses {
		s := r.l.segment(u.id)
		if s == nil || s.file == nil {
			continue // given back: it held nothing any more
		}
		h, ok := r.heads[u.id]
		if ok && h.generation > u.generation {
			continue // opened anew since: it had become empty
		}
		stream := h.stream
		if !ok || h.generation < u.generation {
			found, yes, err := r.resync(s, 1, u.generation, 0)
			if err != nil {
				return err
			}
			if !yes {
				continue // its head was torn as it was opened anew
			}
			stream = found.stream
			s.state, s.fresh, s.generation, s.last = sealed, false, u.generation, u.generation
		}
		if stream == fresh {
			first = append(first, &scan{seg: s, stream: stream})
		} else {
			later = append(later, &scan{seg: s, stream: stream})
		}
	}
	scans := append(first, later...)
	inOrder(r.l.opt.Parallel, len(scans), func(i int) chain { return r.l.readChain(scans[i].seg.file, scans[i].seg.id) },
		func(i int, ahead chain) { r.scan(scans[i], ahead) })
	if r.foreign != nil {
		return r.foreign
	}
	r.release()
	return nil
}

// scan hops through a segment from header to header and replays it, but for
// its last batch, which may be torn: that is held back until it is known what
// was synced.
func (r *recovery) scan(sc *scan, ahead chain) {
	if sc.stream == fresh {
		r.replayHeld()
	}
	s := sc.seg
	r.scans = append(r.scans, sc)
	l := r.l
	for !sc.sealed && sc.end < l.segmentBlocks() {
		b, err := l.batchAt(s, sc.end, ahead)
		if err != nil || b.generation != s.generation || b.number <= sc.number() || r.void(b.number) {
			h, found, foreign := r.resync(s, sc.end+1, s.generation, sc.number())
			if errors.Is(err, block.Unsupported) {
				foreign = err
			}
			r.foreign = cmp.Or(r.foreign, foreign)
			if !found || foreign != nil {
				break
			}
			if sc.end > 0 { // a head carries only a state table
				r.rots = append(r.rots, rot{s.id, sc.end, h.number})
			}
			sc.broken = true
			sc.end = h.block
			continue
		}
		r.durable = max(r.durable, b.durable)
		if sc.held != nil {
			r.accept(sc)
		}
		sc.held, sc.end, sc.sealed = &b, b.next(), b.kind == kindSeal
		if b.payloadBlocks == 0 {
			r.accept(sc) // the header is all there is of it
		}
	}
}

// number is that of the newest batch found in the segment.
func (sc *scan) number() uint64 {
	if sc.held != nil {
		return sc.held.number
	}
	return sc.last.number
}

// accept counts the batch that was held back.
func (r *recovery) accept(sc *scan) {
	b := sc.held
	sc.held, sc.last = nil, b.header
	sc.seg.last = b.number
	if b.number > r.last.number {
		r.last = b.header
	}
	if sc.stream == fresh {
		r.replay(b)
		r.keep(b)
	}
}

// replayHeld accepts what older segments of the fresh stream hold back: the
// opening of a newer one shows that it was synced.
func (r *recovery) replayHeld() {
	for _, sc := range r.scans {
		if sc.stream == fresh && sc.held != nil {
			r.accept(sc)
		}
	}
}

// release decides on the last batches of all segments: one that no later
// header calls synced is torn unless its payload is whole. One with an entry
// that was applied was synced in any case: then its payload has rotted (L2).
func (r *recovery) release() {
	for _, sc := range r.scans {
		b := sc.held
		if b == nil {
			continue
		}
		if b.number <= r.durable || r.whole(sc.seg, b) || r.applied(b) {
			r.accept(sc)
			continue
		}
		sc.held, sc.end, sc.sealed = nil, b.block, false
	}
}

// whole checks the payloads of a batch.
func (r *recovery) whole(s *segment, b *batch) bool {
	for i := range b.sections {
		for k := range b.sections[i].entries {
			e := &b.sections[i].entries[k]
			if e.payloadBytes == 0 {
				continue
			}
			p, err := readPayload(s.file, e)
			if err != nil {
				return false
			}
			p.Release()
		}
	}
	for i := range b.moves {
		m := &b.moves[i]
		p := payload.New(len(m.CRCs) * block.Size)
		err := readFull(s.file, p.Bytes(), int64(m.payload)*block.Size)
		ok := err == nil && slices.Equal(block.AppendCRCs(nil, p.Bytes()), m.CRCs)
		p.Release()
		if !ok {
			return false
		}
	}
	return true
}

func (l *Log) appliedOf(key ReplicaKey) (EntryID, bool) {
	if l.opt.Applied == nil {
		return EntryID{}, false
	}
	return l.opt.Applied(key)
}

func (r *recovery) applied(b *batch) bool {
	for i := range b.sections {
		s := &b.sections[i]
		if id, ok := r.l.appliedOf(s.key); ok && len(s.entries) > 0 && s.first <= id.Index {
			return true
		}
	}
	return false
}

// replay changes the state by one batch of the fresh stream.
func (r *recovery) replay(b *batch) {
	switch {
	case b.kind == kindTable && b.number > r.table.number: // a cut within a segment
		for _, v := range b.voids {
			if !slices.Contains(r.voids, v) {
				r.voids = append(r.voids, v)
			}
		}
		for i := range b.sections {
			s := &b.sections[i]
			x := r.reps[s.key]
			if x == nil { // the batch that created it has rotted; its entries are missing
				x = &rebuilt{key: s.key, base: s.trunc.Index}
				r.reps[s.key] = x
			}
			x.state(s, b.number)
			x.table(s)
		}
	case b.kind == kindWrites:
		ord := 0
		for i := range b.sections {
			s := &b.sections[i]
			r.replaySection(b, s, ord)
			ord += len(s.entries)
		}
	}
}

func (r *recovery) replaySection(b *batch, s *section, ord int) {
	newer := b.number > r.table.number
	x := r.reps[s.key]
	if newer && s.flags&sectionCreate != 0 {
		x = &rebuilt{key: s.key, base: s.trunc.Index}
		r.reps[s.key] = x
	}
	if x == nil && newer && s.flags&sectionRemove == 0 {
		x = &rebuilt{key: s.key, base: s.trunc.Index, gap: "the batch that created it has rotted"}
		r.reps[s.key] = x
	}
	if x == nil {
		return // removed since
	}
	if s.flags&sectionReset != 0 {
		x.slots, x.terms = nil, nil
		if newer {
			x.base = s.trunc.Index
		}
	}
	if len(s.entries) > 0 {
		x.expect(EntryID{s.first - 1, s.prev})
	}
	for i, e := range s.entries {
		x.place(s.first+uint64(i), e.term, slot{segment: b.segment, bytes: e.payloadBytes, batch: uint16(b.block),
			ord: uint16(ord + i), payload: uint16(e.payload)}, i == 0)
	}
	if !newer {
		return
	}
	if s.flags&sectionRemove != 0 {
		delete(r.reps, s.key)
		return
	}
	x.state(s, b.number)
}

// state takes over what a section says about the whole replica.
func (x *rebuilt) state(s *section, number uint64) {
	x.hard, x.trunc, x.last, x.cover = s.hard, s.trunc, EntryID{s.last, s.prev}, number
	if n := len(s.entries); n > 0 {
		x.last.Term = s.entries[n-1].term
	}
	if n := max(s.last, x.base) - x.base; n < uint64(len(x.slots)) {
		x.slots, x.terms = x.slots[:n], x.terms[:n]
	}
}

// table takes over what only a state table says.
func (x *rebuilt) table(s *section) {
	if s.flags&sectionDamaged != 0 {
		x.gap = "an earlier start found it damaged"
	}
}

// expect makes a hole where another entry is than the log had there: a batch
// that has rotted overwrote it.
func (x *rebuilt) expect(id EntryID) {
	if id.Index <= x.base || id.Index-x.base > uint64(len(x.slots)) {
		return
	}
	if at := id.Index - x.base - 1; x.terms[at] != id.Term {
		x.slots[at], x.terms[at] = slot{}, 0
	}
}

// maxHole bounds the entries that recovery believes to be missing in one place.
const maxHole = 1 << 24

// place sets entry i; the first of a section discards all from there on.
// Entries at or below base are gone by a truncation that is known already.
func (x *rebuilt) place(i, term uint64, s slot, discard bool) {
	if discard {
		n := max(i, x.base+1) - x.base - 1
		if n < uint64(len(x.slots)) {
			x.slots, x.terms = x.slots[:n], x.terms[:n]
		}
	}
	if i <= x.base {
		return
	}
	at := i - x.base - 1
	if at > uint64(len(x.slots))+maxHole {
		x.gap = fmt.Sprintf("entries up to %d are missing", i-1)
		return
	}
	for uint64(len(x.slots)) < at {
		x.slots, x.terms = append(x.slots, slot{}), append(x.terms, 0)
	}
	x.slots, x.terms = append(x.slots[:at], s), append(x.terms[:at], term)
}

// judge tells torn from rotten where a chain ended without a seal.
func (r *recovery) judge() {
	tails := r.last.tails
	if r.last.number > 0 {
		t := &tails[r.last.stream]
		if *t = (position{r.last.segment, r.last.next()}); r.last.kind == kindSeal {
			*t = position{}
		}
	}
	for _, sc := range r.scans {
		at := tails[sc.stream]
		switch {
		case sc.sealed:
		case at.segment != sc.seg.id:
			// It was sealed before the newest table, and the seal is not found.
			sc.broken = true
			r.rots = append(r.rots, rot{sc.seg.id, sc.end, r.table.number})
		case sc.end < at.block:
			sc.broken = true
			r.rots = append(r.rots, rot{sc.seg.id, sc.end, r.last.number})
		case !sc.broken:
			sc.seg.state, sc.seg.next = open, sc.end
			r.l.w.open[sc.stream] = sc.seg
		}
	}
	for _, at := range tails {
		if at.block == 0 || slices.ContainsFunc(r.scans, func(sc *scan) bool { return sc.seg.id == at.segment }) {
			continue
		}
		r.rots = append(r.rots, rot{at.segment, 0, r.last.number})
	}
	for _, x := range r.rots {
		r.l.logf("disk %v: a batch header at block %d of segment %d has rotted", r.l.sb.Disk, x.block, x.segment)
	}
}

// settle makes replicas of what was rebuilt, and finds the damaged ones (L4, L6).
func (r *recovery) settle() {
	l := r.l
	for _, k := range l.opt.Known {
		// All that the log said of it may have been in what has rotted: its vote, too.
		if id, ok := l.appliedOf(k); ok && r.reps[k] == nil && len(r.rots) > 0 {
			r.reps[k] = &rebuilt{key: k, base: id.Index, trunc: id, last: id, hard: HardState{Term: id.Term, Commit: id.Index},
				gap: "the index knows it, and the log does not: what it said of it may have rotted"}
		}
	}
	keys := make([]ReplicaKey, 0, len(r.reps))
	for k := range r.reps {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, ReplicaKey.Compare)
	for _, k := range keys {
		x := r.reps[k]
		applied, known := l.appliedOf(k)
		why := x.gap
		for _, rt := range r.rots {
			if x.cover < rt.before && why == "" {
				why = fmt.Sprintf("batches of segment %d that may hold its newest state have rotted", rt.segment)
			}
		}
		rep := x.build(l, applied, known)
		if rep.damage != "" {
			why = rep.damage
		}
		if why != "" {
			rep.damage = why
			l.damaged = append(l.damaged, Damage{Key: k, Reason: why})
			l.logf("disk %v: replica %v is damaged: %s", l.sb.Disk, k, why)
		}
		l.addReplica(rep)
	}
}

// build makes the replica: entries above the truncation, without a hole up to
// last; the log goes on at applied if it does not hold that entry.
func (x *rebuilt) build(l *Log, applied EntryID, known bool) *Replica {
	rep := &Replica{log: l, key: x.key, trunc: x.trunc, hard: x.hard, durable: x.trunc.Index}
	x.expect(x.last)
	missing := uint64(0) // highest index that is missing
	first := uint64(0)
	for i := x.trunc.Index + 1; i <= x.last.Index && i <= x.base+uint64(len(x.slots)); i++ {
		if x.slots[i-x.base-1].segment == 0 {
			missing = i
			if first == 0 {
				first = i
			}
		}
	}
	if end := x.base + uint64(len(x.slots)); x.last.Index > max(end, x.trunc.Index) {
		missing = x.last.Index
		if first == 0 {
			first = max(end, x.trunc.Index) + 1
		}
	}
	last := x.last.Index
	from := x.trunc.Index + 1
	switch {
	case missing == 0:
	case known && missing <= applied.Index:
		// All that was lost is applied durably: the log begins behind it (L4).
		rep.trunc = applied
		from = applied.Index + 1
	default:
		rep.damage = fmt.Sprintf("entries %d to %d are missing", first, missing)
		last = first - 1
	}
	rep.durable = rep.trunc.Index
	for i := from; i <= last; i++ {
		s := x.slots[i-x.base-1]
		rep.push(x.terms[i-x.base-1], s)
		rep.durable = i
		l.claim(l.segment(s.segment), int(s.bytes))
	}
	if known && applied.Index > rep.trunc.Index {
		if term, ok := rep.Term(applied.Index); !ok || term != applied.Term {
			_, ends := rep.truncate(applied, nil)
			l.endClaims(ends)
		}
	}
	if known {
		rep.hard.Commit = max(rep.hard.Commit, applied.Index)
		rep.hard.Term = max(rep.hard.Term, applied.Term)
	}
	rep.laid.exists, rep.laid.hard, rep.laid.trunc, rep.laid.last = true, rep.hard, rep.trunc, rep.lastID()
	return rep
}

// cut writes the state as recovered, and the numbers that are void, before
// anything can be answered on the ground of it (L3): in the open segment behind
// the last valid batch, over what may be torn there, or at the head of a new one.
func (l *Log) cut(r *recovery) error {
	w := &l.w
	last := max(r.last.number, r.durable)
	for _, v := range r.voids {
		last = max(last, v.to)
	}
	w.number, w.durable, w.table = last+1, r.last.number, r.table.number
	w.voids = r.voids
	if r.table.number > 0 {
		w.number += voidSkip
		was := len(w.voids)
		for _, s := range l.segs {
			if s.state == open || s.state == free && !s.fresh && s.file != nil {
				w.voids = append(w.voids, void{last + 1, last + voidSkip, s.id})
			}
		}
		if len(w.voids) > was+maxVoidSegments {
			w.voids = append(w.voids[:was], void{last + 1, last + voidSkip, anySegment})
		}
	}
	s := w.open[fresh]
	if s != nil && s.next+l.tableBlocks()+1 > l.segmentBlocks() {
		if err := l.sealNow(fresh); err != nil {
			return err
		}
		s = nil
	}
	if _, possible := l.usable(); possible == 0 && w.open[survivors] != nil && l.opt.Live != nil &&
		!l.opt.Live(w.open[survivors].id, w.open[survivors].generation) {
		// It holds garbage, moves that the index does not know of: sealed it can be freed.
		if err := l.sealNow(survivors); err != nil {
			return err
		}
	}
	if s != nil {
		l.beginBatch(s, kindTable, fresh)
		l.encodeTable()
		return l.writeNow()
	}
	if s = l.pick(0); s == nil {
		s = l.reclaim()
	}
	if s == nil {
		return block.Errorf(block.NoSpace, "no segment is free")
	}
	l.beginTable(s, fresh)
	if err := l.writeNow(); err != nil {
		return err
	}
	w.open[fresh], w.table = s, w.durable
	return nil
}

func (l *Log) sealNow(stream int) error {
	s := l.w.open[stream]
	l.beginBatch(s, kindSeal, stream)
	e := newEncoder(l.w.buf)
	l.endBatch(&e)
	if err := l.writeNow(); err != nil {
		return err
	}
	l.setState(s, sealed)
	l.w.open[stream] = nil
	return nil
}

// reclaim finds a sealed segment that holds nothing, by what the index says at
// open.
func (l *Log) reclaim() *segment {
	for _, s := range l.segs {
		if s.state == sealed && s.claims == 0 && s.last < l.w.table && l.opt.Live != nil && !l.opt.Live(s.id, s.generation) {
			return s
		}
	}
	return nil
}

// writeNow writes the batch that was prepared and waits for it.
func (l *Log) writeNow() error {
	r := &l.w.round
	r.write()
	if r.err != nil {
		if block.KindOf(r.err) != block.NoSpace {
			if err := MarkFailed(l.fs, l.dir, l.sb, r.err.Error()); err != nil {
				l.logf("disk %v cannot be marked failed: %v", l.sb.Disk, err)
			}
		}
		return r.err
	}
	s := r.seg
	if r.make {
		l.setFile(s, r.file)
	}
	s.fresh = false
	l.w.durable, s.last, s.next = r.header.number, r.header.number, r.header.next()
	return nil
}
