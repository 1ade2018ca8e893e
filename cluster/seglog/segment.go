package seglog

import (
	"cmp"
	"fmt"
	"math"
	"path"
	"slices"
	"sort"
	"strconv"
	"strings"
	"sync"
	"time"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/vfs"
)

// segmentState is what a segment is used for.
type segmentState uint8

const (
	missing segmentState = iota // no file; one may be made
	making                      // its file is being made, or removed
	free                        // may be opened
	open                        // the tail of a stream
	sealed                      // full; holds what is claimed or live
	numStates
)

// segment is one numbered file of the log.
type segment struct {
	id         SegmentID
	state      segmentState
	file       vfs.File // nil while missing
	generation uint64   // number of the batch that opened it; 0 if never opened
	next       uint32   // open: the block of the next batch
	last       uint64   // number of its last batch; generation if unknown

	// claims are entries above their replica's truncation, or whose end is not
	// durable yet; claimBlocks their payload.
	claims      int
	claimBlocks int64

	// reserved: open for truncations and hard states alone, while no other is free.
	reserved bool

	freedAt uint64 // pin clock when it was found to hold nothing; 0 if it was not
	busy    bool   // being collected or zeroed: not to be opened
	fresh   bool   // its file was made and nothing was written to it
	zeroed  int64  // bytes that were zeroed ahead
	// collected is the poke at which its survivors had been moved; 0 if never.
	collected uint64
}

// mayHold tells whether a segment was not written since v was voided.
func (s *segment) mayHold(v void) bool {
	return s.state != missing && !s.fresh && s.last <= v.to && s.generation <= v.to
}

func segmentName(dir string, id SegmentID) string {
	return path.Join(dir, logFolder, fmt.Sprintf("%08d.seg", id))
}

// MinBytes is the least capacity of a log.
func MinBytes(sb Superblock) int64 { return minSegments * sb.SegmentBytes }

// FileBytes is what the files of a log that is not open take.
func FileBytes(fs vfs.FS, dir string, sb Superblock) (int64, error) {
	names, err := fs.List(path.Join(dir, logFolder))
	if err != nil && block.KindOf(err) != block.NotFound {
		return 0, err
	}
	var n int64
	for _, name := range names {
		if _, ok := parseSegmentName(name); ok {
			n += sb.SegmentBytes
		}
	}
	return n, nil
}

// parseSegmentName is the reverse of segmentName's last element.
func parseSegmentName(name string) (SegmentID, bool) {
	base, ok := strings.CutSuffix(name, ".seg")
	if !ok || len(base) != 8 {
		return 0, false
	}
	n, err := strconv.ParseUint(base, 10, 32)
	return SegmentID(n), err == nil && n > 0
}

// segment returns the segment of a number, nil if there is none.
func (l *Log) segment(id SegmentID) *segment {
	if id == 0 || int(id) > len(l.segs) {
		return nil
	}
	return l.segs[id-1]
}

// makeFile makes the file of a segment, durably, at its full size. It blocks,
// and touches nothing of the Log that changes.
func (l *Log) makeFile(id SegmentID) (vfs.File, error) {
	f, err := l.fs.Open(segmentName(l.dir, id), vfs.Create|vfs.Direct, vfs.ClassLog)
	if err != nil {
		return nil, err
	}
	if err = f.Allocate(0, l.sb.SegmentBytes); err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = l.fs.SyncDir(path.Join(l.dir, logFolder))
	}
	if err != nil {
		f.Close()
		if block.KindOf(err) == block.NoSpace {
			_ = l.fs.Remove(segmentName(l.dir, id)) // or at the next start
		}
		return nil, err
	}
	return f, nil
}

func (l *Log) setFile(s *segment, f vfs.File) {
	l.space.refused = false
	l.mu.Lock()
	defer l.mu.Unlock()
	s.file, s.fresh = f, true
}

// pins keep segments from being opened anew while their old content is read.
// Time is counted in segments freed: a pin taken at clock c keeps what was
// freed at c or later.
type pins struct {
	mu    sync.Mutex
	clock uint64
	held  []pinCount // by clock, rising
}

type pinCount struct {
	clock uint64
	n     int
}

func (p *pins) take() (clock uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if k := len(p.held); k > 0 && p.held[k-1].clock == p.clock {
		p.held[k-1].n++
	} else {
		p.held = append(p.held, pinCount{p.clock, 1})
	}
	return p.clock
}

func (p *pins) release(clock uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	i := sort.Search(len(p.held), func(i int) bool { return p.held[i].clock >= clock })
	p.held[i].n--
	drop := 0
	for drop < len(p.held) && p.held[drop].n == 0 {
		drop++
	}
	p.held = append(p.held[:0], p.held[drop:]...)
}

// oldest is the lowest clock that is held.
func (p *pins) oldest() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.held) == 0 {
		return math.MaxUint64
	}
	return p.held[0].clock
}

// tick returns the clock of something freed now.
func (p *pins) tick() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clock++
	return p.clock - 1
}

func (p *pins) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := 0
	for _, h := range p.held {
		n += h.n
	}
	return n
}

// Pin keeps every segment that holds anything now from being overwritten until
// release, so that locations looked up now stay readable. Pin is called on the
// Loop; release may be called anywhere, once.
func (l *Log) Pin() (release func()) {
	clock := l.pins.take()
	return func() { l.pins.release(clock) }
}

// Generation tells how often a segment was begun anew: it rises with each use.
// 0 if the segment was never used.
func (l *Log) Generation(id SegmentID) uint64 {
	if s := l.segment(id); s != nil {
		return s.generation
	}
	return 0
}

func (l *Log) live(s *segment) int {
	if l.owner == nil {
		return 0
	}
	return l.owner.LiveBlocks(s.id)
}

// empty tells whether nothing in a sealed segment is needed any more (L5, L7),
// but for pins.
func (l *Log) empty(s *segment) bool {
	return s.state == sealed && s.claims == 0 && !s.busy && s.last < l.w.table && l.live(s) == 0
}

// reap looks for sealed segments that became empty and for empty ones that no
// pin holds any longer, and frees those.
func (l *Log) reap() {
	if l.loop == nil {
		return
	}
	oldest := l.pins.oldest()
	freed := false
	for _, s := range l.segs {
		if s.state != sealed {
			continue
		}
		if !l.empty(s) {
			s.freedAt = 0
			continue
		}
		if s.freedAt == 0 {
			s.freedAt = 1 + l.pins.tick()
		}
		if oldest > s.freedAt-1 {
			l.setState(s, free)
			s.freedAt, s.collected = 0, 0
			l.space.reused += l.sb.SegmentBytes
			freed = true
		}
	}
	if freed && l.w.stalled {
		l.pumpLater()
	}
}

// setState changes what a segment is used for.
func (l *Log) setState(s *segment, to segmentState) {
	l.counts[s.state]--
	l.counts[to]++
	s.state = to
}

// count counts the segments of each state, as recovery found them.
func (l *Log) count() {
	l.counts = [numStates]int{}
	for _, s := range l.segs {
		l.counts[s.state]++
	}
}

// inUse returns the open segments and those with claims, in the order of their ids.
func (l *Log) inUse() []*segment {
	out := make([]*segment, 0, len(l.claimed)+numStreams)
	for _, s := range l.claimed {
		out = append(out, s)
	}
	for _, s := range l.w.open {
		if s != nil && s.claims == 0 {
			out = append(out, s)
		}
	}
	if r := l.w.round.seg; l.w.busy && r != nil && r.state == open && r.claims == 0 && l.w.open[l.w.round.header.stream] != r {
		out = append(out, r) // it is being opened
	}
	slices.SortFunc(out, func(a, b *segment) int { return cmp.Compare(a.id, b.id) })
	return out
}

// usable counts segments that can be opened now, or could be made.
func (l *Log) usable() (ready, possible int) {
	ready = l.counts[free]
	made := len(l.segs) - l.counts[missing] - ready
	if l.space.full {
		return ready, ready
	}
	return ready, max(ready, l.maxSegments-made)
}

// pick chooses a segment to open and leaves reserve ones. It takes a free one
// while more than the reserve are, the one that is zeroed furthest; else one
// that is to be made, so that the reserve consists of files that exist.
func (l *Log) pick(reserve int) *segment {
	ready, possible := l.usable()
	if possible <= reserve {
		return nil
	}
	if ready <= reserve {
		return l.vacant()
	}
	var best *segment
	for _, s := range l.segs {
		if s.state == free && !s.busy && (best == nil || s.zeroed > best.zeroed) {
			best = s
		}
	}
	if best == nil && !l.space.full {
		return l.vacant()
	}
	return best
}

// vacant returns a segment without a file within the capacity, nil if none.
func (l *Log) vacant() *segment {
	if l.filesMade() >= l.maxSegments {
		return nil
	}
	if l.counts[missing] > 0 {
		return l.segs[slices.IndexFunc(l.segs, func(s *segment) bool { return s.state == missing })]
	}
	s := &segment{id: SegmentID(len(l.segs) + 1)}
	l.mu.Lock()
	l.segs = append(l.segs, s)
	l.mu.Unlock()
	l.counts[missing]++
	return s
}

// claimEnd is claims that entries had on a segment.
type claimEnd struct {
	segment SegmentID
	n       int32
	blocks  int32
}

func appendClaimEnd(ends []claimEnd, s slot) []claimEnd {
	if s.segment == 0 {
		return ends
	}
	if k := len(ends); k > 0 && ends[k-1].segment == s.segment {
		ends[k-1].n++
		ends[k-1].blocks += int32(blocksOf(int(s.bytes)))
		return ends
	}
	return append(ends, claimEnd{s.segment, 1, int32(blocksOf(int(s.bytes)))})
}

// claim notes that an entry with so much payload is in s.
func (l *Log) claim(s *segment, payloadBytes int) {
	if s.claims == 0 {
		l.claimed[s.id] = s
	}
	s.claims++
	s.claimBlocks += int64(blocksOf(payloadBytes))
	l.claimBlocks += int64(blocksOf(payloadBytes))
}

func (l *Log) endClaims(ends []claimEnd) {
	for _, e := range ends {
		s := l.segment(e.segment)
		s.claims -= int(e.n)
		s.claimBlocks -= int64(e.blocks)
		l.claimBlocks -= int64(e.blocks)
		if s.claims < 0 || s.claimBlocks < 0 {
			panic(fmt.Sprintf("seglog: segment %d has %d claims", s.id, s.claims))
		}
		if s.claims == 0 {
			delete(l.claimed, s.id)
		}
	}
}

// refusedRetry is how long after the file system was full it is tried again.
const refusedRetry = time.Second

// refusedFile takes note that the file system has no room for a segment. It is
// tried again: room may come back without the log's doing.
func (l *Log) refusedFile() {
	if !l.space.refused {
		l.logf("disk %v: its file system has no room for another segment of %d bytes: the log goes on with the %d that it has", l.sb.Disk, l.sb.SegmentBytes, l.filesMade())
	}
	l.space.refused = true
	if l.space.full {
		return
	}
	l.space.full = true
	l.loop.After(refusedRetry, func() {
		l.space.full = false
		l.rest()
		if l.space.refused && !l.idle.running && l.err == nil && l.w.closing == nil {
			l.makeSpare() // also with spares enough: only a file that is made shows that there is room
		}
		if l.w.stalled {
			l.pumpLater()
		}
	})
}

// filesMade counts the segments that have a file.
func (l *Log) filesMade() int { return len(l.segs) - l.counts[missing] }

// Stalled tells whether writes wait for a segment to become free.
func (l *Log) Stalled() bool { return l.w.stalled }

// Space tells how the room of the disk is used. It looks at the segments with
// claims, which the cap of the log bounds, and at no others.
func (l *Log) Space() Space {
	sp := Space{TotalBytes: int64(l.maxSegments) * l.sb.SegmentBytes, ReusedBytes: l.space.reused,
		MovedBytes: int64(l.stats.MoveBlocks) * block.Size, Pins: l.pins.count(), Refused: l.space.refused}
	sp.FileBytes = int64(l.filesMade()) * l.sb.SegmentBytes
	sp.ClaimedBytes = l.claimBlocks * block.Size
	if l.owner != nil {
		sp.LiveBytes = l.owner.LiveTotal() * block.Size
	}
	sp.HeldBytes = sp.LiveBytes
	for _, s := range l.inUse() {
		sp.HeldBytes += l.sb.SegmentBytes - int64(l.live(s))*block.Size
	}
	_, possible := l.usable()
	sp.FreeBytes = int64(possible) * l.sb.SegmentBytes
	return sp
}

// shortFree is how many segments the log likes to have free or possible: below,
// it asks the index for checkpoints and collects without regard to load.
func (l *Log) shortFree() int { return max(4, l.maxSegments/16) }

// Shortage tells whether free segments are few.
func (l *Log) Shortage() bool {
	_, possible := l.usable()
	return possible < l.shortFree()
}

// Poke says that a checkpoint became durable or that live bits were cleared:
// segments may have become free.
func (l *Log) Poke() {
	l.gc.pokes++
	l.gc.check = true
	l.reap()
	l.rest()
	l.collect()
}
