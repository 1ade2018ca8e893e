package stamp

import (
	"fmt"
	"sync"
)

// Verdict is what is wrong with a sector.
type Verdict string

const (
	// Torn: bytes that are neither one write's nor another's.
	Torn Verdict = "torn"
	// Misdirected: another sector's or another volume's bytes.
	Misdirected Verdict = "misdirected"
	// Invented: a write that was never issued.
	Invented Verdict = "invented"
	// Lost: an acknowledged write is not there, an older state is.
	Lost Verdict = "lost"
	// Resurrected: an older state came back after a newer one had been read.
	Resurrected Verdict = "resurrected"
	// Late: a write took effect after it was certain that it no longer could.
	Late Verdict = "late"
)

// Fault is a wrong sector.
type Fault struct {
	Verdict Verdict
	Sector  int64
	Text    string
}

func (f *Fault) Error() string {
	return fmt.Sprintf("sector %d is %s: %s", f.Sector, f.Verdict, f.Text)
}

// instant is a tick of the history's own clock: every begin and end takes one,
// so that "before" needs no wall time.
type instant uint64

const never = ^instant(0)

// write is one write (or trim: zero is true) as far as the history knows it.
type write struct {
	seq    Seq
	writer uint32
	from   int64 // first sector
	to     int64 // exclusive
	zero   bool
	begin  instant
	// acked is when its success was known; never while it is in flight and when
	// its outcome stayed unknown: it may take effect at any time then.
	acked instant
	// over is since when it can take effect no more, if that is known although
	// whether it did is not.
	over instant
}

// landing is a write as one of its sectors saw it. A write of many blocks may
// land in one and not in another while it is in flight.
type landing struct {
	*write
	// seen is the end of the first read of the sector that returned the write.
	seen instant
}

func (l *landing) done() instant { return min(l.acked, l.seen) }

// bound is when the write has taken effect, if it has at all.
func (l *landing) bound() instant { return min(l.done(), l.over) }

// History knows every write to one volume and judges reads by it. A value that
// a read returns must be of a write that began before the read ended, and no
// other write may lie wholly between that write's end and the read's begin.
// Once read, a value counts as done, so reads never go back. All methods may
// be called by many goroutines.
type History struct {
	volume [16]byte

	mu      sync.Mutex
	now     instant
	nextSeq Seq
	sectors map[int64][]*landing // in order of begin; the dead are pruned
	reads   map[*Read]struct{}
	ended   map[Seq]struct{} // writes without an answer that are over
	blank   *landing         // the state before any write

	acked, unknown, checked uint64
}

// NewHistory returns the history of a volume that reads as zero.
func NewHistory(volume [16]byte) *History {
	return &History{volume: volume, sectors: map[int64][]*landing{}, reads: map[*Read]struct{}{}, ended: map[Seq]struct{}{}, now: 1,
		blank: &landing{write: &write{zero: true, over: never}, seen: never}}
}

func (h *History) tick() instant { h.now++; return h.now }

// Write is a write or trim that was begun.
type Write struct {
	h *History
	w *write
}

// Begin enters a write of the sectors [from, from+n) and fills p, which is n
// sectors long, with its stamps. With p nil it is a trim: the sectors read as
// zero after it.
func (h *History) Begin(writer uint32, from, n int64, p []byte) *Write {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.nextSeq++
	w := &write{seq: h.nextSeq, writer: writer, from: from, to: from + n, zero: p == nil, begin: h.tick(), acked: never, over: never}
	for s := from; s < w.to; s++ {
		if p != nil {
			Stamp{Volume: h.volume, Sector: s, Writer: writer, Seq: w.seq}.Put(p[(s-from)*SectorBytes:])
		}
		h.sectors[s] = append(h.sectors[s], &landing{write: w, seen: never})
	}
	return &Write{h, w}
}

// Seq is the write's number, which its stamps carry.
func (w *Write) Seq() Seq { return w.w.seq }

// Acked says that the write was acknowledged.
func (w *Write) Acked() {
	w.h.mu.Lock()
	defer w.h.mu.Unlock()
	w.w.acked = w.h.tick()
	w.h.acked++
	for s := w.w.from; s < w.w.to; s++ {
		w.h.prune(s)
	}
}

// Unknown says that no answer came: the write may take effect at any time.
func (w *Write) Unknown() {
	w.h.mu.Lock()
	defer w.h.mu.Unlock()
	w.h.unknown++
}

// Over says that a write without an answer takes no effect from now on: whether
// it has taken one stays unknown. An answer may still come.
func (w *Write) Over() {
	w.h.mu.Lock()
	defer w.h.mu.Unlock()
	if w.w.acked != never || w.w.over != never {
		return
	}
	w.w.over = w.h.tick()
	w.h.ended[w.w.seq] = struct{}{}
}

// Refused says that the write certainly had no effect and never will.
func (w *Write) Refused() {
	w.h.mu.Lock()
	defer w.h.mu.Unlock()
	for s := w.w.from; s < w.w.to; s++ {
		l := w.h.sectors[s]
		for i, x := range l {
			if x.write == w.w {
				w.h.sectors[s] = append(l[:i:i], l[i+1:]...)
				break
			}
		}
	}
}

// prune drops the writes of sector s that no read can return any more.
func (h *History) prune(s int64) {
	oldest := h.now
	for r := range h.reads {
		oldest = min(oldest, r.begin)
	}
	l := h.sectors[s]
	var newest instant // the latest begin of a write that was done before all reads in flight
	for _, w := range l {
		if w.done() < oldest {
			newest = max(newest, w.begin)
		}
	}
	kept := l[:0:0]
	for _, w := range l {
		if w.bound() >= newest {
			kept = append(kept, w)
		}
	}
	h.sectors[s] = kept
}

// Read is a read that was begun.
type Read struct {
	h     *History
	from  int64
	begin instant
}

// BeginRead enters a read that starts at sector from.
func (h *History) BeginRead(from int64) *Read {
	h.mu.Lock()
	defer h.mu.Unlock()
	r := &Read{h, from, h.tick()}
	h.reads[r] = struct{}{}
	return r
}

// Failed ends a read that returned nothing.
func (r *Read) Failed() {
	r.h.mu.Lock()
	defer r.h.mu.Unlock()
	delete(r.h.reads, r)
}

// Check ends the read with what it returned, a whole number of sectors, and
// returns the first fault.
func (r *Read) Check(p []byte) error {
	h := r.h
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.reads, r)
	end := h.tick()
	for i := int64(0); i < int64(len(p))/SectorBytes; i++ {
		h.checked++
		if f := h.judge(r, end, r.from+i, p[i*SectorBytes:][:SectorBytes]); f != nil {
			return f
		}
	}
	return nil
}

func (h *History) judge(r *Read, end instant, sector int64, p []byte) *Fault {
	fault := func(v Verdict, format string, args ...any) *Fault {
		return &Fault{v, sector, fmt.Sprintf(format, args...)}
	}
	st, err := Parse(p)
	if err != nil {
		return fault(Torn, "%v", err)
	}
	l := h.sectors[sector]
	if st.Seq != 0 && (st.Volume != h.volume || st.Sector != sector) {
		return fault(Misdirected, "holds sector %d of volume %x", st.Sector, st.Volume)
	}
	if st.Seq > h.nextSeq {
		return fault(Invented, "sequence %d was never issued", st.Seq)
	}
	// The newest write that every read begun since must see.
	var floor *landing
	for _, w := range l {
		if w.done() < r.begin && (floor == nil || w.begin > floor.begin) {
			floor = w
		}
	}
	candidates := l
	if st.Seq == 0 {
		candidates = append(l[:len(l):len(l)], h.blank)
	}
	var found *landing
	for _, w := range candidates {
		same := w.seq == st.Seq || st.Seq == 0 && w.zero
		if same && (floor == nil || w.bound() >= floor.begin || w == floor) && (found == nil || w.begin > found.begin) {
			found = w
		}
	}
	if found == nil {
		verdict, how := Lost, "acknowledged"
		_, over := h.ended[st.Seq]
		if floor != nil && floor.seen < r.begin {
			verdict, how = Resurrected, "already read"
		}
		if over {
			verdict = Late
		}
		if floor == nil {
			return fault(Invented, "sequence %d does not cover this sector or was refused", st.Seq)
		}
		return fault(verdict, "holds sequence %d, but sequence %d (zero: %v) was %s before the read began", st.Seq, floor.seq, floor.zero, how)
	}
	if found != h.blank && found.seen == never && st.Seq != 0 {
		found.seen = end
	}
	return nil
}

// Counts returns how many writes were acknowledged, how many stayed of unknown
// outcome, and how many sectors were judged.
func (h *History) Counts() (acked, unknown, checked uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.acked, h.unknown, h.checked
}
