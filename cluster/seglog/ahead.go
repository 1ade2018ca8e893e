package seglog

import (
	"io"
	"slices"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
	"firn.io/firn/internal/vfs"
)

const (
	// aheadSegments bounds the segments whose headers were read and are not
	// replayed yet, per worker.
	aheadSegments = 2
	// maxWindow bounds what is read at once where headers lie close together.
	maxWindow = 1 << 20
	// maxKeptBytes bounds the header areas that a recovery keeps in memory for
	// the entries that are to be applied again.
	maxKeptBytes = 128 << 20
)

// chain is the header areas of a segment by their block, as readArea gave them.
type chain map[uint32]headerArea

type headerArea struct {
	header
	area []byte
}

// readChain hops through a segment from header to header, up to the first that
// is not one, and reads nothing else: payloads only where they are so small
// that skipping them would cost more. It blocks, and touches nothing that changes.
func (l *Log) readChain(f vfs.File, id SegmentID) chain {
	w := &window{file: f, end: l.sb.SegmentBytes, buf: payload.New(maxWindow), size: 4 * block.Size}
	defer w.buf.Release()
	c := make(chain)
	for at := uint32(0); at < l.segmentBlocks(); {
		h, area, err := l.readArea(w, id, at)
		if err != nil {
			break
		}
		c[at] = headerArea{h, slices.Clone(area)}
		at = h.next()
	}
	return c
}

// window reads a file from front to back with gaps: what lies close together at
// once, what lies far apart alone.
type window struct {
	file io.ReaderAt
	end  int64
	buf  *payload.Buf
	off  int64 // of buf's content in the file
	n    int   // bytes of it
	size int   // to be read next
}

// ReadAt implements io.ReaderAt for aligned p and off.
func (w *window) ReadAt(p []byte, off int64) (int, error) {
	if w.holds(p, off) {
		return copy(p, w.buf.Bytes()[off-w.off:]), nil
	}
	if hop := off - w.off; hop <= 2*int64(w.n) {
		w.size = min(2*w.size, maxWindow)
	} else if hop > 4*int64(w.size) {
		w.size = max(w.size/2, block.Size)
	}
	w.off, w.n = off, int(min(int64(max(w.size, len(p))), w.end-off, maxWindow))
	if w.n < len(p) || readFull(w.file, w.buf.Bytes()[:w.n], off) != nil {
		w.n = 0
		return w.file.ReadAt(p, off)
	}
	return copy(p, w.buf.Bytes()), nil
}

func (w *window) holds(p []byte, off int64) bool {
	return off >= w.off && off+int64(len(p)) <= w.off+int64(w.n)
}

// batchAt reads the batch at a block, from what was read ahead if it is there.
func (l *Log) batchAt(s *segment, at uint32, ahead chain) (batch, error) {
	if a, ok := ahead[at]; ok {
		if b, ok := decodeRecords(&a.header, a.area); ok {
			return b, nil
		}
		return batch{}, errNoBatch
	}
	return l.readBatch(s.file, s.id, at)
}

// kept are header areas with entries above the durably applied ones, by the
// block of their batch: Raft reads those again when the replicas open, each
// replica its own, and batches hold entries of many.
type kept map[SegmentID]map[uint32][]byte

// keep keeps the header area of a batch that counts.
func (r *recovery) keep(b *batch) {
	if r.keptBytes+int(b.headerBytes) > maxKeptBytes || !r.unapplied(b) {
		return
	}
	of := r.l.kept[b.segment]
	if of == nil {
		of = make(map[uint32][]byte)
		r.l.kept[b.segment] = of
	}
	of[b.block] = slices.Clone(b.area)
	r.keptBytes += len(b.area)
}

// unapplied tells whether a batch holds an entry that is not durably applied.
func (r *recovery) unapplied(b *batch) bool {
	for i := range b.sections {
		s := &b.sections[i]
		if n := len(s.entries); n > 0 {
			if id, ok := r.l.appliedOf(s.key); !ok || s.first+uint64(n)-1 > id.Index {
				return true
			}
		}
	}
	return false
}

// Recovered lets go of what recovery keeps in memory so that replicas open fast.
// It may be called any number of times.
func (l *Log) Recovered() {
	l.mu.Lock()
	l.kept = nil
	l.mu.Unlock()
}

// decodeKept decodes a header area that was kept: it was whole when it was read.
func decodeKept(area []byte) (batch, error) {
	if h, ok := decodeFixed(area); ok {
		if b, ok := decodeRecords(&h, area); ok {
			return b, nil
		}
	}
	return batch{}, errNoBatch
}
