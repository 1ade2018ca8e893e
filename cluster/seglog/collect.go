package seglog

import (
	"slices"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/loop"
	"firn.io/firn/internal/payload"
	"firn.io/firn/internal/vfs"
)

const (
	// maxVictims bounds one run of collection: more victims make longer sorted
	// runs of survivors, and take more memory.
	maxVictims = 8
	// moveBlocks is the payload of one batch of survivors.
	moveBlocks = 256
	// maxBudget bounds what ingest earns for collection while it does not run.
	maxBudget = 16 << 20
	// headersPerStep bounds the header areas of a victim that are read at once.
	headersPerStep = 256
	// againAfter is after how many pokes a segment is collected again whose
	// survivors were moved and which is still pointed at.
	againAfter = 4
)

// collector copies what is live in sealed segments that are mostly dead into
// the stream of survivors, so that they become empty.
//
// One run: choose victims; read their headers, piece by piece, for records with
// live blocks; sort those by (volume, chunk, block); copy them, a batch at a
// time, and after each is durable let the index repoint. The victims become
// free once the index has let go of them, durably.
type collector struct {
	running bool
	check   bool // segments changed since the last look
	pokes   uint64
	// budget is payload bytes that may be copied: ingest earns them, at a rate
	// that keeps what is freed ahead of what is written. A shortage needs none.
	budget int64
	rate   float64
	// wait resumes a run that waits for budget.
	wait func()

	victims []*segment
	found   []survivor
	next    int // found[:next] are copied
}

// survivor is a record to be moved.
type survivor struct {
	Record
	from Location
}

// earn takes note of ingest.
func (g *collector) earn(bytes int) {
	g.budget = min(maxBudget, g.budget+int64(float64(bytes)*g.rate))
}

// collect starts a run if one is due, or resumes one that waits.
func (l *Log) collect() {
	g := &l.gc
	if l.loop == nil || l.owner == nil {
		return
	}
	ending := l.err != nil || l.w.closing != nil
	if g.wait != nil {
		if g.budget > 0 || ending || l.w.stalled || g.check && l.Shortage() {
			resume := g.wait
			g.wait = nil
			resume()
		}
		return
	}
	if ending {
		return
	}
	if g.running || !g.check && !l.w.stalled {
		return
	}
	g.check = false
	if !l.due() {
		return
	}
	g.victims = l.chooseVictims()
	if len(g.victims) == 0 {
		if l.Shortage() {
			l.owner.NeedSpace()
		}
		return
	}
	g.running = true
	g.found, g.next = g.found[:0], 0
	for _, s := range g.victims {
		s.busy = true
	}
	l.readVictim(0, 0)
}

// due tells whether collection is worth its copying, and sets its rate.
func (l *Log) due() bool {
	var used, taken int64 // blocks
	waiting := 0          // victims that the index has not let go of yet
	for _, s := range l.segs {
		if s.state == sealed && s.collected > 0 && l.gc.pokes < s.collected+againAfter {
			waiting++
		}
		if s.state == open || s.state == sealed {
			used += int64(l.segmentBlocks())
			taken += min(int64(l.segmentBlocks()), int64(l.live(s))+s.claimBlocks)
		}
	}
	if used == 0 {
		return false
	}
	_, possible := l.usable()
	fill := float64(taken) / float64(used)
	l.gc.rate = min(8, max(0.5, 1.5*fill/max(0.05, 1-fill)))
	switch {
	case l.Shortage():
		if waiting > 0 {
			l.owner.NeedSpace()
		}
		return possible+waiting < l.shortFree()
	case (possible+waiting)*3 < l.maxSegments:
		return fill < 0.9
	}
	// Room is left: only what bounds waste to about the live data.
	return used > 16*int64(l.segmentBlocks()) && fill < 0.5
}

// chooseVictims picks by cost and benefit: free space that a copy of the rest
// gains, weighted by age, for what has lived long is likely to go on living.
// When segments are short only the gain counts.
func (l *Log) chooseVictims() []*segment {
	type candidate struct {
		s     *segment
		live  int
		score float64
	}
	var all []candidate
	short := l.Shortage()
	blocks := float64(l.segmentBlocks())
	for _, s := range l.segs {
		if s.state != sealed || s.claims > 0 || s.busy || s.last >= l.w.table {
			continue
		}
		if s.collected > 0 && (!short || l.gc.pokes < s.collected+againAfter) {
			continue
		}
		live := l.live(s)
		fill := float64(live) / blocks
		if live == 0 || fill > 0.95 || fill > 0.8 && !short {
			continue
		}
		score := 1 - fill
		if !short {
			score *= float64(l.w.number-s.generation) / (1 + fill)
		}
		all = append(all, candidate{s, live, score})
	}
	slices.SortStableFunc(all, func(a, b candidate) int {
		switch {
		case a.score > b.score:
			return -1
		case a.score < b.score:
			return 1
		}
		return int(a.s.id) - int(b.s.id)
	})
	// The survivors of a run fill at most one segment, and what room there is.
	_, possible := l.usable()
	most := int64(possible) * int64(l.segmentBlocks()) / 2
	if s := l.w.open[survivors]; s != nil {
		most += int64(l.room(s)) * 3 / 4
	}
	most = min(most, int64(l.segmentBlocks())*7/8)
	var victims []*segment
	for _, c := range all {
		if len(victims) == maxVictims {
			break
		}
		if int64(c.live) > most {
			continue
		}
		most -= int64(c.live)
		victims = append(victims, c.s)
	}
	return victims
}

// victimStep is what one step over a victim's headers found.
type victimStep struct {
	batches []batch
	next    uint32
	end     bool
}

// readVictim reads the headers of victim k from a block on, and notes what is
// live.
func (l *Log) readVictim(k int, from uint32) {
	g := &l.gc
	if k == len(g.victims) {
		l.sortFound()
		return
	}
	s := g.victims[k]
	f := s.file
	var step victimStep
	l.loop.Do(loop.Merge, func() { step = l.readHeaders(f, s.id, s.generation, from) }, func() {
		if l.err != nil || l.w.closing != nil {
			l.endRun(false)
			return
		}
		for i := range step.batches {
			l.findLive(s, &step.batches[i])
		}
		if step.end {
			l.readVictim(k+1, 0)
		} else {
			l.readVictim(k, step.next)
		}
	})
}

// readHeaders reads batches of a sealed segment. It blocks. What follows a bad
// header is looked for block by block, as in recovery.
func (l *Log) readHeaders(f vfs.File, id SegmentID, generation uint64, from uint32) (step victimStep) {
	for at := from; at < l.segmentBlocks(); {
		b, err := l.readBatch(f, id, at)
		if err != nil || b.generation != generation {
			at++
			continue
		}
		if b.kind == kindSeal {
			break
		}
		at = b.next()
		step.batches = append(step.batches, b)
		if len(step.batches) == headersPerStep {
			step.next = at
			return step
		}
	}
	step.end = true
	return step
}

// findLive notes the records of a batch that the index points at.
func (l *Log) findLive(s *segment, b *batch) {
	for i := range b.sections {
		sec := &b.sections[i]
		for k := range sec.entries {
			e := &sec.entries[k]
			if e.payloadBytes == 0 || !l.anyLive(s.id, e.payload, blocksOf(int(e.payloadBytes))) {
				continue
			}
			r, ok := l.owner.Describe(sec.key, EntryID{sec.first + uint64(k), e.term}, e.data)
			if ok {
				r.Key = sec.key
				l.addLive(s.id, r, e.payload)
			}
		}
	}
	for i := range b.moves {
		m := &b.moves[i]
		l.addLive(s.id, m.Record, m.payload)
	}
}

func (l *Log) anyLive(id SegmentID, from, n uint32) bool {
	for b := from; b < from+n; b++ {
		if l.owner.Live(id, uint16(b)) {
			return true
		}
	}
	return false
}

// addLive notes the live runs of a record whose payload begins at a block.
func (l *Log) addLive(id SegmentID, r Record, at uint32) {
	n := uint32(len(r.CRCs))
	for i := uint32(0); i < n; {
		if !l.owner.Live(id, uint16(at+i)) {
			i++
			continue
		}
		k := i + 1
		// Runs end where an index's extents end, at multiples of their largest size.
		for k < n && l.owner.Live(id, uint16(at+k)) && (uint32(r.Block)+k)%block.MaxExtentBlocks != 0 {
			k++
		}
		part := r
		part.Block += block.Index(i)
		part.CRCs = r.CRCs[i:k:k]
		l.gc.found = append(l.gc.found, survivor{part, Location{id, uint16(at + i)}})
		i = k
	}
}

func compareRecords(a, b *Record) int {
	if c := slices.Compare(a.Volume[:], b.Volume[:]); c != 0 {
		return c
	}
	if a.Chunk != b.Chunk {
		if a.Chunk < b.Chunk {
			return -1
		}
		return 1
	}
	if a.Block != b.Block {
		return int(a.Block) - int(b.Block)
	}
	return a.Key.Compare(b.Key)
}

func (l *Log) sortFound() {
	slices.SortStableFunc(l.gc.found, func(a, b survivor) int { return compareRecords(&a.Record, &b.Record) })
	l.copyNext()
}

// copyNext copies the next batch of survivors.
func (l *Log) copyNext() {
	g := &l.gc
	switch {
	case l.err != nil || l.w.closing != nil:
		l.endRun(false)
		return
	case g.next == len(g.found):
		l.endRun(true)
		return
	case g.budget <= 0 && !l.w.stalled && !l.Shortage():
		g.wait = l.copyNext
		return
	}
	most := min(moveBlocks, int(l.segmentBlocks())/4)
	blocks := 0
	end := g.next
	for end < len(g.found) && (end == g.next || blocks+len(g.found[end].CRCs) <= most) {
		blocks += len(g.found[end].CRCs)
		end++
	}
	part := g.found[g.next:end]
	g.next = end
	g.budget -= int64(blocks) * block.Size
	buf := payload.New(blocks * block.Size)
	var good []Move
	var bad []survivor
	var bytes []byte
	l.loop.Do(loop.Merge, func() { good, bad, bytes = l.readSurvivors(part, buf.Bytes()) }, func() {
		for i := range bad {
			l.owner.Damaged(bad[i].Record, bad[i].from)
		}
		if len(good) == 0 || l.err != nil {
			buf.Release()
			l.copyNext()
			return
		}
		l.w.moves = append(l.w.moves, &moveBatch{moves: good, payload: bytes, done: func(error) {
			buf.Release()
			l.copyNext()
		}})
		l.pumpLater()
	})
}

// readSurvivors reads records into buf, one after the other, and checks them.
// What fails is left out. It blocks.
func (l *Log) readSurvivors(part []survivor, buf []byte) (good []Move, bad []survivor, bytes []byte) {
	at := 0
	good = make([]Move, 0, len(part))
	for i := range part {
		s := &part[i]
		p := buf[at : at+len(s.CRCs)*block.Size]
		err := l.ReadBlocks(s.from, p)
		for k, crc := range s.CRCs {
			if err != nil || block.CRC(p[k*block.Size:(k+1)*block.Size]) != crc {
				err = errNoBatch
				break
			}
		}
		if err != nil {
			bad = append(bad, *s)
			continue
		}
		at += len(p)
		good = append(good, Move{Record: s.Record, From: s.from})
	}
	return good, bad, buf[:at]
}

// endRun lets go of the victims.
func (l *Log) endRun(moved bool) {
	g := &l.gc
	for _, s := range g.victims {
		s.busy = false
		if moved {
			s.collected = max(1, g.pokes)
		}
	}
	g.victims, g.running, g.check = nil, false, true
	clear(g.found)
	g.found = g.found[:0]
	if l.w.closing != nil || l.err != nil {
		l.pumpLater()
		return
	}
	l.reap()
	if l.Shortage() {
		l.owner.NeedSpace()
	}
	l.collect()
}
