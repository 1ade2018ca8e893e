package seglog

import (
	"errors"
	"io"

	"firn.io/firn/internal/block"
	"firn.io/firn/internal/payload"
	"firn.io/firn/internal/vfs"
)

// errNoBatch says that there is no valid batch where one was looked for.
var errNoBatch = errors.New("no valid batch header")

// readArea reads the header area at a block of a segment and checks that it is
// one, is whole and belongs there. Any other outcome is errNoBatch, or an error
// of the disk.
func (l *Log) readArea(f io.ReaderAt, id SegmentID, at uint32) (h header, area []byte, err error) {
	first := payload.New(block.Size).Bytes()
	if err := readFull(f, first, int64(at)*block.Size); err != nil {
		return h, nil, err
	}
	h, ok := decodeFixed(first)
	if !ok && le.Uint32(first) == batchMagic && le.Uint16(first[4:]) != formatVersion {
		return h, nil, l.otherFormat(f, id, at, first)
	}
	if !ok || h.cluster != l.sb.Cluster || h.disk != l.sb.Disk || h.segment != id || h.block != at || h.next() > l.segmentBlocks() {
		return h, nil, errNoBatch
	}
	area = first
	if n := int(h.headerBlocks()) * block.Size; n > block.Size {
		area = payload.New(n).Bytes()
		copy(area, first)
		if err := readFull(f, area[block.Size:], int64(at+1)*block.Size); err != nil {
			return h, nil, err
		}
	}
	area = area[:h.headerBytes]
	if !checkArea(area) {
		return h, nil, errNoBatch
	}
	return h, area, nil
}

// otherFormat is of kind Unsupported if another build of Firn wrote the header of
// a batch there, in a format of its own: all formats have the magic, the version,
// the identity of the place, the length and the CRC where format 1 has them.
// Otherwise the version has rotted.
func (l *Log) otherFormat(f io.ReaderAt, id SegmentID, at uint32, first []byte) error {
	bytes := le.Uint32(first[72:])
	h := header{segment: SegmentID(le.Uint32(first[40:])), block: le.Uint32(first[44:]), headerBytes: bytes}
	copy(h.cluster[:], first[8:24])
	copy(h.disk[:], first[24:40])
	if h.cluster != l.sb.Cluster || h.disk != l.sb.Disk || h.segment != id || h.block != at ||
		bytes < fixedBytes || bytes > maxHeaderBytes || h.next() > l.segmentBlocks() {
		return errNoBatch
	}
	area := payload.New(int(h.headerBlocks()) * block.Size).Bytes()
	if err := readFull(f, area, int64(at)*block.Size); err != nil {
		return err
	}
	if !checkArea(area[:bytes]) {
		return errNoBatch
	}
	return block.Errorf(block.Unsupported, "block %d of segment %d has format %d of the log, this build knows %d: "+
		"start the build of Firn that wrote it, or a newer one; nothing on the disk was changed", at, id, le.Uint16(first[4:]), formatVersion)
}

// readBatch reads and decodes the batch at a block.
func (l *Log) readBatch(f io.ReaderAt, id SegmentID, at uint32) (batch, error) {
	h, area, err := l.readArea(f, id, at)
	if err != nil {
		return batch{}, err
	}
	b, ok := decodeRecords(&h, area)
	if !ok {
		return b, errNoBatch
	}
	return b, nil
}

// readFull fills p; a file that ends before is errNoBatch.
func readFull(f io.ReaderAt, p []byte, off int64) error {
	n, err := f.ReadAt(p, off)
	if n == len(p) {
		return nil
	}
	if err == io.EOF || err == nil {
		return errNoBatch
	}
	return err
}

// ReadBlocks fills p, a multiple of 4 KiB with an aligned address (a
// payload.Buf's), from loc on. It blocks and may be called anywhere. What
// guards loc, a Pin or that the index points at it, is the caller's, and so is
// checking the CRCs. Kinds: Unavailable once the log is closed, otherwise Corrupt.
func (l *Log) ReadBlocks(loc Location, p []byte) error {
	l.mu.RLock()
	var f vfs.File
	if s := l.segment(loc.Segment); s != nil {
		f = s.file
	}
	shut := l.shut
	l.mu.RUnlock()
	switch {
	case shut:
		return l.closedError()
	case f == nil:
		return block.Errorf(block.Corrupt, "segment %d, which should hold data, does not exist", loc.Segment)
	}
	if err := readFull(f, p, int64(loc.Block)*block.Size); err != nil {
		return block.Wrap(block.Corrupt, err, "read %d bytes at block %d of segment %d", len(p), loc.Block, loc.Segment)
	}
	return nil
}

// ReadEach calls f, which uses ReadBlocks, for 0 to n-1 in any order, several at
// once if the Options say so. It returns when all have returned, with the error
// of one that failed. It blocks and may be called anywhere.
func (l *Log) ReadEach(n int, f func(int) error) error { return each(l.opt.Parallel, n, f) }

func (l *Log) closedError() error {
	return block.Errorf(block.Unavailable, "the log of disk %v is closed", l.sb.Disk)
}

// maxReadEntries bounds one Read.
const maxReadEntries = 4096

// Read returns consecutive durable entries from lo on, below hi: at least one,
// then as many as fit maxBytes of payload and data together. It blocks and may
// be called anywhere. With payloads set each entry that has a payload carries
// it, its CRC checked, one hold for the caller. Kinds: Unavailable when lo is
// not in the log (truncated, or not durable) or the log is closed, Corrupt when what is stored
// fails its check.
func (r *Replica) Read(lo, hi uint64, maxBytes int, payloads bool) ([]Entry, error) {
	l := r.log
	l.mu.RLock()
	if l.shut {
		l.mu.RUnlock()
		return nil, l.closedError()
	}
	if lo <= r.trunc.Index || lo >= hi || lo > min(r.durable, r.LastIndex()) {
		first, last := r.FirstIndex(), r.durable
		l.mu.RUnlock()
		return nil, block.Errorf(block.Unavailable, "entries [%d, %d) of %v: the disk has %d..%d", lo, hi, r.key, first, last)
	}
	var slots []slot
	var files []vfs.File
	var areas [][]byte // of their batches, where recovery has kept them
	bytes := 0
	for i := lo; i < hi && i <= r.durable && i <= r.LastIndex() && len(slots) < maxReadEntries; i++ {
		s := *r.slot(i)
		if bytes += int(s.bytes); bytes > maxBytes && len(slots) > 0 {
			break
		}
		slots = append(slots, s)
		files = append(files, l.segment(s.segment).file)
		areas = append(areas, l.kept[s.segment][uint32(s.batch)])
	}
	unpin := l.Pin()
	l.mu.RUnlock()
	defer unpin()

	var out []Entry
	var at batch
	bytes = 0
	for k, s := range slots {
		if at.segment != s.segment || at.block != uint32(s.batch) || k == 0 {
			b, err := decodeKept(areas[k])
			if err != nil {
				b, err = l.readBatch(files[k], s.segment, uint32(s.batch))
			}
			if err != nil {
				return finishRead(out, block.Wrap(block.Corrupt, err, "entry %d of %v, block %d of segment %d", lo+uint64(k), r.key, s.batch, s.segment))
			}
			at = b
		}
		x, ok := at.entryAt(int(s.ord), r.key, lo+uint64(k))
		if !ok {
			return finishRead(out, block.Errorf(block.Corrupt, "entry %d of %v is not at block %d of segment %d", lo+uint64(k), r.key, s.batch, s.segment))
		}
		bytes += len(x.data) + int(x.payloadBytes)
		if k > 0 && bytes > maxBytes {
			break
		}
		e := Entry{Term: x.term, Index: lo + uint64(k), Data: x.data}
		if payloads && x.payloadBytes > 0 {
			p, err := readPayload(files[k], &x)
			if err != nil {
				return finishRead(out, block.Wrap(block.Corrupt, err, "payload of entry %d of %v, block %d of segment %d", e.Index, r.key, x.payload, s.segment))
			}
			e.Payload = p
		}
		out = append(out, e)
	}
	return out, nil
}

// finishRead gives what was read before an error, or the error if that is nothing.
func finishRead(out []Entry, err error) ([]Entry, error) {
	if len(out) > 0 {
		return out, nil
	}
	return nil, err
}

// entryAt finds the entry by its place among those of the batch.
func (b *batch) entryAt(ord int, key ReplicaKey, index uint64) (entryRecord, bool) {
	for i := range b.sections {
		s := &b.sections[i]
		if ord < len(s.entries) {
			return s.entries[ord], s.key == key && s.first+uint64(ord) == index
		}
		ord -= len(s.entries)
	}
	return entryRecord{}, false
}

func readPayload(f vfs.File, x *entryRecord) (*payload.Buf, error) {
	p := payload.New(int(x.payloadBytes))
	whole := p.Bytes()[:int(blocksOf(int(x.payloadBytes)))*block.Size]
	err := readFull(f, whole, int64(x.payload)*block.Size)
	if err == nil && block.CRC(p.Bytes()) != x.crc {
		err = errors.New("checksum mismatch")
	}
	if err != nil {
		p.Release()
		return nil, err
	}
	return p, nil
}
