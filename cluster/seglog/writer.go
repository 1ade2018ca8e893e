package seglog

import (
	"slices"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
	"firn.io/firn/internal/vfs"
)

// maxBatchBlocks bounds the payload of a batch: what a crash can tear, and what
// a write waits for at most.
const maxBatchBlocks = 4 << 20 / block.Size

// stallRetry is how often a writer without a free segment looks again.
const stallRetry = 20 * time.Millisecond

const (
	// lookPart is which part of a large disk's segments is opened between two
	// looks at all of them for what became free, or is worth collecting.
	lookPart = 1 << 11
	// lookFree is how few free segments make it look at each one that is opened.
	lookFree = 64
)

// write is a queued Write.
type write struct {
	r        *Replica
	seq      uint32 // names its pending slots
	flags    uint8  // of its first section
	hasHard  bool
	hasTrunc bool
	hard     HardState
	trunc    EntryID
	entries  []Entry
	prev     uint64     // term of the entry before entries[0]
	next     int        // entries before are laid out
	ends     []claimEnd // claims that end once it is durable
	early    bool       // its truncation was laid out ahead of its turn
	done     func(error)
}

// releasePayloads gives back the holds of entries [from, to) and returns their
// bytes.
func (q *write) releasePayloads(from, to int) (bytes int) {
	for i := from; i < to; i++ {
		if p := q.entries[i].Payload; p != nil {
			bytes += p.Len()
			p.Release()
		}
	}
	return bytes
}

// part is the piece of a write that went into a batch.
type part struct {
	q        *write
	from, to int
	final    bool
}

// moveBatch is survivors to be written, with their payload.
type moveBatch struct {
	moves   []Move
	next    int    // moves before are laid out
	payload []byte // of moves[next:], one after the other, aligned
	// placed is called, instead of the owner's ApplyMoves, for what did not come
	// from this disk; else nil.
	placed func([]Move)
	// done is called on the Loop when all are durable and the index was told.
	done func(error)
}

// writer is the state of writing.
type writer struct {
	queue    []*write
	moves    []*moveBatch
	seq      uint32
	deferred bool
	busy     bool // a round is in flight
	stalled  bool
	retry    loop.Timer
	turn     int // the stream that was served last

	number  uint64 // of the next batch
	durable uint64 // highest number that was synced
	untold  bool   // no header says so of the last batch yet
	table   uint64 // number of the newest durable state table at a segment's head
	open    [numStreams]*segment
	voids   []void
	buf     []byte // header areas are built here
	round   round

	closing func(error)
	closed  bool
}

// round is one batch on its way: everything that the work off the loop needs.
type round struct {
	log    *Log
	seg    *segment
	file   vfs.File
	make   bool // the segment's file is to be made first
	header header
	area   []byte
	bufs   [][]byte
	crcs   []crcAt
	placed []*slot        // of the entries of this batch
	tails  []*payload.Buf // padded ends of payloads
	parts  []part
	move   *moveBatch
	err    error
	work   func()
	done   func()
}

// crcAt says where in the header area the CRC of a payload belongs.
type crcAt struct {
	at      int
	payload []byte
}

func (l *Log) initWriter() {
	w := &l.w
	w.buf = payload.New(maxHeaderBytes).Bytes()
	w.round.log = l
	w.round.work = w.round.write
	w.round.done = func() { l.finish() }
}

// enqueue adds a write; it goes out with what else this turn brings.
func (l *Log) enqueue(q *write) {
	l.w.queue = append(l.w.queue, q)
	l.pumpLater()
}

func (l *Log) pumpLater() {
	if !l.w.deferred && !l.w.busy {
		l.w.deferred = true
		l.loop.Defer(func() {
			l.w.deferred = false
			l.pump()
		})
	}
}

// pump starts the next round if there is something to write and nothing in
// flight.
func (l *Log) pump() {
	w := &l.w
	if w.busy || w.closed {
		return
	}
	if l.err != nil {
		if w.closing != nil && !l.idle.running && !l.gc.running {
			l.closeFiles()
		}
		return
	}
	stream := fresh
	switch {
	case len(w.queue) > 0 && (len(w.moves) == 0 || w.turn != fresh):
	case len(w.moves) > 0:
		stream = survivors
	case w.closing != nil && w.untold && w.open[fresh] != nil && l.room(w.open[fresh]) > 0:
		l.tellDurable()
		return
	case w.closing != nil && !l.idle.running && !l.gc.running:
		l.closeFiles()
		return
	default:
		return
	}
	if !l.prepare(stream) {
		// The other stream may have room in its open segment.
		stream = l.other(stream)
		if stream < 0 || !l.prepare(stream) {
			l.stall()
			return
		}
	}
	w.turn = stream
	l.launch()
}

// tellDurable writes an empty batch, whose header says that the last one was
// synced: after a clean stop all damage is rot, and none a torn write (L2).
func (l *Log) tellDurable() {
	l.beginBatch(l.w.open[fresh], kindWrites, fresh)
	e := newEncoder(l.w.buf)
	l.endBatch(&e)
	l.launch()
}

func (l *Log) other(stream int) int {
	switch {
	case stream == fresh && len(l.w.moves) > 0:
		return survivors
	case stream == survivors && len(l.w.queue) > 0:
		return fresh
	}
	return -1
}

// prepare builds the next batch of a stream in w.round: a state table if it has
// no segment, its own batch if it fits, else a seal. It returns false when there
// is no segment to open.
func (l *Log) prepare(stream int) bool {
	w := &l.w
	s := w.open[stream]
	if s == nil {
		s = l.successor(stream)
		if s == nil && stream == fresh && l.nextUrgent() != nil {
			if s = l.pick(0); s != nil {
				s.reserved = true
			}
		}
		if s == nil {
			return false
		}
		l.beginTable(s, stream)
		return true
	}
	if s.reserved {
		if _, possible := l.usable(); (possible < 2 || l.tableBytes() > maxTableBytes) && l.room(s) > 0 {
			return l.layUrgent(s)
		}
		s.reserved = false
	}
	if stream == fresh {
		if l.layWrites(s) {
			return true
		}
	} else if l.layMoves(s) {
		return true
	}
	// Without a successor it stays open, so that a recovery can log its cut in it.
	if l.successor(stream) == nil && (stream != fresh || l.nextUrgent() == nil || l.pick(0) == nil) {
		return false
	}
	l.beginBatch(s, kindSeal, stream)
	e := newEncoder(w.buf)
	l.endBatch(&e)
	return true
}

func (l *Log) stall() {
	w := &l.w
	if w.closing != nil {
		l.abandon()
		return
	}
	if !w.stalled {
		w.stalled = true
		l.stats.Stalls++
	}
	if l.owner != nil {
		l.owner.NeedSpace()
	}
	if w.retry == nil {
		w.retry = l.loop.After(stallRetry, func() {
			w.retry = nil
			l.reap()
			l.collect()
			l.pump()
		})
	}
}

// abandon ends what a closing log cannot write for want of a free segment, as a
// crash would.
func (l *Log) abandon() {
	w := &l.w
	err := block.Errorf(block.Unavailable, "the log of disk %v was closed while it was full", l.sb.Disk)
	queue, moves := w.queue, w.moves
	w.queue, w.moves, w.stalled = nil, nil, false
	for _, q := range queue {
		q.releasePayloads(q.next, len(q.entries))
		q.done(err)
	}
	for _, m := range moves {
		m.done(err)
	}
	l.pumpLater()
}

// beginBatch numbers a batch and sets what its header says.
func (l *Log) beginBatch(s *segment, kind batchKind, stream int) {
	w := &l.w
	r := &w.round
	r.seg, r.file, r.make = s, s.file, s.file == nil
	r.area, r.bufs, r.crcs, r.parts, r.move, r.err = nil, r.bufs[:0], r.crcs[:0], r.parts[:0], nil, nil
	r.bufs = append(r.bufs, nil) // the header area
	r.header = header{kind: kind, stream: uint8(stream), cluster: l.sb.Cluster, disk: l.sb.Disk, segment: s.id,
		block: s.next, generation: s.generation, number: w.number, durable: w.durable}
	for i, o := range w.open {
		if o != nil {
			r.header.tails[i] = position{o.id, o.next}
		}
	}
	w.number++
}

// endBatch closes the header area.
func (l *Log) endBatch(e *encoder) {
	r := &l.w.round
	r.area = e.finish(&r.header)
	r.bufs[0] = r.area
}

// beginTable builds the state table that opens a segment (L5).
func (l *Log) beginTable(s *segment, stream int) {
	l.mu.Lock()
	l.setState(s, open)
	s.next, s.generation = 0, l.w.number
	delete(l.kept, s.id)
	l.mu.Unlock()
	l.beginBatch(s, kindTable, stream)
	l.encodeTable()
}

// encodeTable fills a kindTable batch: all replicas, the segments with claims,
// the voided numbers that some segment may still hold.
func (l *Log) encodeTable() {
	w := &l.w
	e := newEncoder(w.buf)
	for _, r := range l.order {
		if !r.laid.exists {
			continue
		}
		e.section(r.laidSection(), 0)
	}
	for _, q := range w.queue { // removed from order, not yet from the disk
		if r := q.r; r.removed && r.laid.exists && q.flags&sectionRemove != 0 {
			e.section(r.laidSection(), 0)
		}
	}
	var claimed []segmentUse
	for _, s := range l.inUse() {
		if s.claims > 0 && s.state == sealed || s.state == open {
			claimed = append(claimed, segmentUse{s.id, s.generation})
		}
	}
	e.segments(claimed)
	kept := w.voids[:0]
	for _, v := range w.voids {
		// A batch written there since has taken the place of what was torn.
		if s := l.segment(v.segment); s != nil && s.mayHold(v) || v.segment == anySegment && slices.ContainsFunc(l.segs, func(s *segment) bool { return s.mayHold(v) }) {
			kept = append(kept, v)
		}
	}
	w.voids = kept
	e.voids(kept)
	l.endBatch(&e)
}

// tableBytes bounds the size of a state table.
func (l *Log) tableBytes() int {
	const perReplica, perSegment, perVoid = sectionBytes, 2 * 10, 3 * 10
	return fixedBytes + 64 + (len(l.order)+1)*perReplica + (len(l.claimed)+numStreams)*perSegment + len(l.w.voids)*perVoid
}

func (l *Log) tableBlocks() uint32 { return blocksOf(l.tableBytes()) }

// maxTableBytes is the size of a state table from which on no segment is opened
// for entries: truncations, which take claims away, find room in the rest.
const maxTableBytes = maxHeaderBytes * 7 / 8

// successor returns the segment that a stream would go on in, nil if there is none
// for it. New data leaves two segments: truncations and survivors are what frees some.
func (l *Log) successor(stream int) *segment {
	if stream != fresh {
		return l.pick(0)
	}
	if l.tableBytes() > maxTableBytes {
		return nil
	}
	return l.pick(2)
}

func (l *Log) segmentBlocks() uint32 { return uint32(l.sb.SegmentBytes / block.Size) }

// cutsKept is how many recoveries in a row find room for their state table in
// an open segment on a disk that has no free one.
const cutsKept = 3

// room is how many blocks of an open segment batches may take: a seal, and
// state tables after crashes, must always fit behind them.
func (l *Log) room(s *segment) uint32 {
	keep := 1 + cutsKept*l.tableBlocks()
	if free := l.segmentBlocks() - s.next; free > keep {
		return free - keep
	}
	return 0
}

// largestBatch is how many blocks a batch of one entry may have.
func (l *Log) largestBatch() int64 {
	return int64(l.segmentBlocks()) - 1 - (cutsKept+1)*int64(l.tableBlocks())
}

// layWrites lays out as many queued writes as fit one batch of s. It returns
// false when not even a part of the first does.
func (l *Log) layWrites(s *segment) bool {
	w := &l.w
	room := l.room(s)
	if room == 0 {
		return false
	}
	e := newEncoder(w.buf)
	var blocks uint32
	ord := 0
	begun := false
	l.mu.Lock()
	defer l.mu.Unlock()
	for len(w.queue) > 0 {
		q := w.queue[0]
		n := fitting(q, len(e.area), blocks, room, ord)
		if n < 0 || n == 0 && q.next < len(q.entries) {
			break
		}
		if !begun {
			begun = true
			l.beginBatch(s, kindWrites, fresh)
		}
		p := part{q: q, from: q.next, to: q.next + n, final: q.next+n == len(q.entries)}
		l.laySection(&e, &p)
		for i := p.from; i < p.to; i++ {
			l.layEntry(&e, q, i, s, &blocks, ord)
			ord++
		}
		q.next = p.to
		w.round.parts = append(w.round.parts, p)
		if !p.final {
			break
		}
		w.queue[0] = nil
		w.queue = w.queue[1:]
	}
	if !begun {
		return false
	}
	h := &w.round.header
	h.payloadBlocks = blocks
	l.endBatch(&e)
	l.placePayloads(s)
	return true
}

// fitting is how many further entries of q fit a batch that has so much
// already; -1 if not even its section does.
func fitting(q *write, area int, blocks, room uint32, ord int) int {
	area += sectionBytes
	if area > maxHeaderBytes || blocksOf(area)+blocks > room {
		return -1
	}
	n := 0
	for _, x := range q.entries[q.next:] {
		area += entryBytes + len(x.Data)
		if x.Payload != nil {
			blocks += blocksOf(x.Payload.Len())
		}
		if area > maxHeaderBytes || blocksOf(area)+blocks > room || blocks > maxBatchBlocks || ord+n == 1<<16-1 {
			break
		}
		n++
	}
	return n
}

// laySection encodes what a part says about its replica. The hard state waits
// for the last part, so that none is durable before its entries (L5).
func (l *Log) laySection(e *encoder, p *part) {
	q := p.q
	laid := &q.r.laid
	sec := section{key: q.r.key}
	if p.from == 0 {
		sec.flags = q.flags
		laid.exists = q.flags&sectionRemove == 0
		if q.hasTrunc && !(q.early && q.trunc.Index < laid.trunc.Index) {
			laid.trunc = q.trunc
			if q.flags&(sectionReset|sectionCreate) != 0 || laid.last.Index < q.trunc.Index {
				laid.last = q.trunc
			}
		}
	}
	sec.prev = laid.last.Term
	if p.to > p.from {
		if p.from == 0 {
			sec.prev = q.prev
		}
		x := &q.entries[p.to-1]
		laid.last = EntryID{x.Index, x.Term}
		sec.first = q.entries[p.from].Index
	}
	if p.final && q.hasHard {
		laid.hard = q.hard
	}
	sec.hard, sec.trunc, sec.last = laid.hard, laid.trunc, laid.last.Index
	e.section(&sec, p.to-p.from)
}

// layEntry encodes entry i of q. Its slot counts payload blocks from the end
// of the header area until placePayloads knows where that is.
func (l *Log) layEntry(e *encoder, q *write, i int, s *segment, blocks *uint32, ord int) {
	x := &q.entries[i]
	n := 0
	if x.Payload != nil {
		n = x.Payload.Len()
	}
	at := e.entry(x, n)
	rel := *blocks
	if n > 0 {
		l.addPayload(at, x.Payload.Bytes())
		*blocks += blocksOf(n)
	}
	l.stats.Entries++
	l.stats.PayloadBytes += uint64(n)
	r := q.r
	place := slot{segment: s.id, bytes: uint32(n), batch: uint16(s.next), ord: uint16(ord), payload: uint16(rel)}
	l.claim(s, n)
	if !r.removed && x.Index > r.trunc.Index && x.Index <= r.LastIndex() {
		if sl := r.slot(x.Index); sl.pendingOf(q.seq) {
			*sl = place
			l.w.round.placed = append(l.w.round.placed, sl)
			return
		}
	}
	// Discarded while it waited: until the write that did is durable, a recovery
	// needs the entry.
	for k := len(l.w.queue) - 1; ; k-- {
		if later := l.w.queue[k]; later.r == r {
			later.ends = appendClaimEnd(later.ends, place)
			return
		}
	}
}

// addPayload puts p behind the batch, padded to whole blocks, uncopied but for
// its unaligned end.
func (l *Log) addPayload(at int, p []byte) {
	r := &l.w.round
	r.crcs = append(r.crcs, crcAt{at, p})
	whole := len(p) &^ (block.Size - 1)
	if whole > 0 {
		r.bufs = append(r.bufs, p[:whole])
	}
	if whole < len(p) {
		end := payload.New(block.Size)
		clear(end.Bytes()[copy(end.Bytes(), p[whole:]):])
		r.tails = append(r.tails, end)
		r.bufs = append(r.bufs, end.Bytes())
	}
}

// placePayloads turns the slots' payload blocks into blocks of the segment.
func (l *Log) placePayloads(s *segment) {
	r := &l.w.round
	base := uint16(s.next + r.header.headerBlocks())
	for i, sl := range r.placed {
		sl.payload += base
		r.placed[i] = nil
	}
	r.placed = r.placed[:0]
}

// layMoves lays out as much of the first batch of survivors as fits.
func (l *Log) layMoves(s *segment) bool {
	w := &l.w
	m := w.moves[0]
	room := l.room(s)
	area, n := fixedBytes, 0
	var blocks uint32
	for _, x := range m.moves[m.next:] {
		area += moveBytes + 4*len(x.CRCs)
		if blocksOf(area)+blocks+uint32(len(x.CRCs)) > room {
			break
		}
		blocks += uint32(len(x.CRCs))
		n++
	}
	if n == 0 {
		return false
	}
	l.beginBatch(s, kindMoves, survivors)
	e := newEncoder(w.buf)
	part := m.moves[m.next : m.next+n]
	for i := range part {
		e.move(&part[i].Record)
	}
	r := &w.round
	r.header.payloadBlocks = blocks
	l.endBatch(&e)
	at := s.next + r.header.headerBlocks()
	for i := range part {
		part[i].To = Location{s.id, uint16(at)}
		at += uint32(len(part[i].CRCs))
	}
	bytes := int(blocks) * block.Size
	r.bufs = append(r.bufs, m.payload[:bytes])
	m.payload = m.payload[bytes:]
	m.next += n
	r.move = m
	return true
}

// launch sends the round to the disk.
func (l *Log) launch() {
	w := &l.w
	w.busy, w.stalled = true, false
	l.idle.touched = true
	l.loop.Do(loop.DiskWrite, w.round.work, w.round.done)
}

// write is the blocking part of a round.
func (r *round) write() {
	if r.make {
		if r.file, r.err = r.log.makeFile(r.header.segment); r.err != nil {
			return
		}
	}
	for _, c := range r.crcs {
		le.PutUint32(r.area[c.at:], block.CRC(c.payload))
	}
	sealHeader(r.area[:r.header.headerBytes])
	if _, r.err = r.file.WriteAtv(r.bufs, int64(r.header.block)*block.Size); r.err == nil {
		r.err = r.file.Sync()
	}
}

// finish is called on the loop when the round's work has ended.
func (l *Log) finish() {
	w := &l.w
	r := &w.round
	w.busy = false
	for i, t := range r.tails {
		t.Release()
		r.tails[i] = nil
	}
	r.tails = r.tails[:0]
	clear(r.bufs)
	if r.err == nil {
		r.err = l.err // other work has failed meanwhile
	}
	if r.err != nil {
		l.finishFailed()
		return
	}
	s := r.seg
	h := &r.header
	if r.make {
		l.setFile(s, r.file)
	}
	w.durable, s.last, s.next = h.number, h.number, h.next()
	w.untold = h.records > 0
	l.stats.Batches++
	l.stats.HeaderBlocks += uint64(h.headerBlocks())
	l.stats.BatchBlocks += uint64(h.headerBlocks() + h.payloadBlocks)
	switch h.kind {
	case kindTable:
		w.open[h.stream], w.table = s, h.number
	case kindSeal:
		w.open[h.stream] = nil
		l.setState(s, sealed)
	case kindWrites:
		l.finishWrites()
	case kindMoves:
		l.stats.Moves += uint64(h.records)
		l.stats.MoveBlocks += uint64(h.payloadBlocks)
		m := r.move
		r.move = nil
		// At once: until the index points at it, nothing keeps the segment.
		tell := l.owner.ApplyMoves
		if m.placed != nil {
			tell = m.placed
		}
		tell(m.moves[m.next-int(h.records) : m.next])
		if m.next == len(m.moves) {
			w.moves[0] = nil
			w.moves = w.moves[1:]
			m.done(nil)
		}
	}
	if h.kind == kindTable || h.kind == kindSeal {
		s.fresh = false
		l.looks++
		if _, possible := l.usable(); possible < lookFree || l.looks*lookPart >= len(l.segs) {
			l.looks = 0
			l.reap()
			l.gc.check = true
		}
	}
	// What the answers bring about in this turn goes into the next batch.
	l.pumpLater()
	l.rest()
	l.collect()
}

// finishWrites ends what a durable batch of writes carried.
func (l *Log) finishWrites() {
	r := &l.w.round
	l.mu.Lock()
	for _, p := range r.parts {
		rep := p.q.r
		for rep.durable < rep.LastIndex() && rep.slot(rep.durable+1).segment != 0 {
			rep.durable++
		}
	}
	l.mu.Unlock()
	for i, p := range r.parts {
		l.gc.earn(p.q.releasePayloads(p.from, p.to))
		if p.final || p.q.early {
			l.endClaims(p.q.ends)
			p.q.ends = nil
		}
		if p.final {
			p.q.done(nil)
		}
		r.parts[i] = part{}
	}
}

// finishFailed ends a round that did not work. A file that could not be made
// for want of room takes nothing with it; anything else is final.
func (l *Log) finishFailed() {
	w := &l.w
	r := &w.round
	if r.make && r.file == nil && block.KindOf(r.err) == block.NoSpace {
		l.mu.Lock()
		l.setState(r.seg, missing)
		r.seg.generation = 0
		l.mu.Unlock()
		l.refusedFile()
		l.stall()
		return
	}
	err := r.err
	parts := r.parts
	r.parts = nil
	m, late := r.move, l.err != nil
	r.move = nil
	l.fail(err)
	if late && m != nil {
		m.done(l.err)
	}
	for _, p := range parts {
		p.q.releasePayloads(p.from, p.to)
		if p.final {
			l.loop.Post(func() { p.q.done(l.err) })
		}
	}
}
