package seglog

import (
	"errors"
	"path"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
	"firn.io/firn/internal/vfs"
)

// openSegments opens the files there are, syncs what a killed process may have
// left in the page cache, and makes sure that reads come from the disk.
func (r *recovery) openSegments() error {
	l := r.l
	folder := path.Join(l.dir, logFolder)
	if err := l.fs.MkdirAll(folder); err != nil {
		return err
	}
	names, err := l.fs.List(folder)
	if err != nil {
		return err
	}
	var there []*segment
	for _, name := range names {
		id, ok := parseSegmentName(name)
		if !ok || int64(id) > MaxSegments {
			continue
		}
		for int(id) > len(l.segs) {
			l.segs = append(l.segs, &segment{id: SegmentID(len(l.segs) + 1)})
		}
		there = append(there, l.segs[id-1])
	}
	if err := each(l.opt.Parallel, len(there), func(i int) error { return l.openFile(there[i]) }); err != nil {
		return err
	}
	return l.fs.SyncDir(folder)
}

// openFile opens a segment's file at its full size, with nothing in the page
// cache that is not on the disk, and the other way round.
func (l *Log) openFile(s *segment) error {
	f, err := l.fs.Open(segmentName(l.dir, s.id), vfs.Direct, vfs.ClassLog)
	if err != nil {
		return err
	}
	s.file, s.state = f, sealed
	size, err := f.Size()
	if err == nil && size < l.sb.SegmentBytes {
		if unwritten(f, size) && !l.lives(s) { // its making was cut short, or found no room
			s.file, s.state = nil, missing
			if err := f.Close(); err != nil {
				return err
			}
			return l.fs.Remove(segmentName(l.dir, s.id))
		}
		err = f.Allocate(0, l.sb.SegmentBytes)
	}
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = f.DropCache()
	}
	return err
}

// MaxSegments bounds the number of segments of a disk: 64 TiB of 64 MiB.
const MaxSegments = 1 << 20

// head is what block 0 of a segment holds.
type head struct {
	header
	err error
}

// findTable reads the head of every segment and keeps the newest state table.
func (r *recovery) findTable() error {
	l := r.l
	var odd []*segment
	found := make([]head, len(l.segs))
	_ = each(l.opt.Parallel, len(l.segs), func(i int) error {
		if f := l.segs[i].file; f != nil {
			b, err := l.readBatch(f, l.segs[i].id, 0)
			found[i] = head{b.header, err}
		}
		return nil
	})
	for i, s := range l.segs {
		if s.file == nil {
			continue
		}
		b := &found[i]
		if errors.Is(b.err, block.Unsupported) {
			return b.err
		}
		if b.err != nil || b.kind != kindTable || b.generation != b.number {
			s.state = free
			if s.fresh = zeroHead(s.file); !s.fresh || l.lives(s) {
				odd = append(odd, s)
			}
			continue
		}
		s.generation, s.last = b.number, b.number
		r.heads[s.id] = b.header
		if b.number > r.table.number {
			r.table.header = b.header
		}
	}
	if r.table.number > 0 {
		table, err := l.readBatch(l.segment(r.table.segment).file, r.table.segment, 0)
		if err != nil {
			return err
		}
		r.table = table
	}
	r.voids = r.table.voids
	for id, h := range r.heads {
		if r.void(h.number) {
			return block.Errorf(block.Corrupt, "segment %d begins with batch %d, which was cut off", id, h.number)
		}
	}
	return r.probe(odd)
}

// lives tells whether the durable index may point into a segment.
func (l *Log) lives(s *segment) bool { return l.opt.Live == nil || l.opt.Live(s.id, 0) }

// zeroHead tells whether a segment was never written. One that lost its head
// to zeros has the rest of its table, or a batch, behind it.
func zeroHead(f vfs.File) bool { return unwritten(f, headBytes) }

// headBytes is what is looked at to tell whether a segment was ever written.
const headBytes = 2 * block.Size

// unwritten tells whether a file of so many bytes begins with zeros.
func unwritten(f vfs.File, size int64) bool {
	p := payload.New(headBytes).Bytes()[:min(size, headBytes)&^(block.Size-1)]
	if readFull(f, p, 0) != nil {
		return false
	}
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// probe looks into segments whose head is not valid, nor as it is before the
// first use: torn while it was opened anew, then nothing newer follows; or rotten.
// What holds batches, or what the index points into, stays sealed until the index
// lets go of it.
func (r *recovery) probe(odd []*segment) error {
	for _, s := range odd {
		h, newer, err := r.resync(s, 1, 0, r.table.number)
		if err != nil {
			return err
		}
		if !newer {
			var older bool
			if h, older, err = r.resync(s, 1, 0, 0); err != nil {
				return err
			}
			if !older {
				if r.l.opt.Live != nil && r.l.opt.Live(s.id, 0) {
					r.l.logf("disk %v: segment %d holds data, and none of its headers can be read: it is kept", r.l.sb.Disk, s.id)
					s.state, s.fresh, s.generation, s.last = sealed, false, 1, 1
				}
				continue
			}
		}
		if r.table.number == 0 {
			return block.Errorf(block.Corrupt, "segment %d holds batches, and no segment begins with a state table that can be read: the heads have rotted. "+
				"Replace the disk, and its replicas are filled from others; nothing on it was changed", s.id)
		}
		s.state, s.fresh, s.generation, s.last = sealed, false, h.generation, h.number
		if newer {
			r.heads[s.id] = header{stream: h.stream, number: h.generation, generation: h.generation, segment: s.id}
			r.table.claimed = append(r.table.claimed, segmentUse{s.id, h.generation})
		}
	}
	return nil
}
