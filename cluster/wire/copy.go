package wire

import (
	"firn.io/firn/internal/block"
)

// CopyKind says what a replica that is behind asks of another one (C3). Values
// travel.
type CopyKind uint8

const (
	// CopyOpen asks for a view of the group's state at At or later.
	CopyOpen CopyKind = 1
	// CopyScan asks for the records of the view with keys in [From, To).
	CopyScan CopyKind = 2
	// CopyData asks for blocks. They come as the answer's only payload, one run
	// after the other.
	CopyData CopyKind = 3
	// CopyClose gives the view back. It has no answer.
	CopyClose CopyKind = 4
)

// Limits of a copy's messages.
const (
	// MaxCopyKeyBytes bounds a record's key.
	MaxCopyKeyBytes = 64
	// MaxCopyRuns bounds the runs of one CopyData.
	MaxCopyRuns = 256
	// MaxCopyBlocks bounds the blocks of all runs together.
	MaxCopyBlocks = 256
	// MaxCopyScanBytes is at which size of records a scan's answer ends; one
	// record may be larger.
	MaxCopyScanBytes = 96 << 10
)

// CopyRequest is one question. ID is unique per sender of requests.
type CopyRequest struct {
	ID    uint64
	Kind  CopyKind
	Group block.GroupID
	View  uint64 // all but CopyOpen

	// CopyOpen: who asks, and the index that the view has to reach.
	Replica block.ReplicaID
	At      uint64

	// CopyScan.
	From, To []byte

	// CopyData.
	Runs []CopyRun
}

// CopyRun is Count blocks of an extent of the view, from its block Skip on.
type CopyRun struct {
	Key         []byte
	Skip, Count uint8
}

// CopyStatus says how a question was taken. Values travel.
type CopyStatus uint8

const (
	// CopyOK: the answer is here.
	CopyOK CopyStatus = 1
	// CopyGone: the view does not exist any more, or never did.
	CopyGone CopyStatus = 2
	// CopyBusy: there are too many views or questions already.
	CopyBusy CopyStatus = 3
	// CopyUnable: this node has no replica of the group that has applied so much.
	CopyUnable CopyStatus = 4
	// CopyFailed: what was asked for cannot be read, or makes no sense.
	CopyFailed CopyStatus = 5
)

// CopyAnswer answers the request with its ID.
type CopyAnswer struct {
	ID     uint64
	Status CopyStatus
	View   uint64
	// Bytes is about the data of the view (CopyOpen).
	Bytes uint64
	// Records of a scan, and the key to go on at, nil at the end.
	Records []CopyRecord
	Next    []byte
}

// CopyRecord is a record of the index as it is stored, without the local id.
type CopyRecord struct {
	Key, Value []byte
}

// AppendCopyRequest appends the encoding of q to dst.
func AppendCopyRequest(dst []byte, q *CopyRequest) []byte {
	dst = append(dst, byte(q.Kind), 0, 0, 0)
	dst = appendU64(dst, q.ID)
	dst = appendU64(dst, uint64(q.Group))
	dst = appendU64(dst, q.View)
	switch q.Kind {
	case CopyOpen:
		dst = appendU64(appendU64(dst, uint64(q.Replica)), q.At)
	case CopyScan:
		dst = append(append(dst, byte(len(q.From))), q.From...)
		dst = append(append(dst, byte(len(q.To))), q.To...)
	case CopyData:
		dst = appendU16(dst, uint16(len(q.Runs)))
		for i := range q.Runs {
			r := &q.Runs[i]
			dst = append(append(dst, byte(len(r.Key))), r.Key...)
			dst = append(dst, r.Skip, r.Count)
		}
	}
	return dst
}

// key takes a key with its length.
func (r *reader) key() []byte {
	n := int(r.u8())
	if n > MaxCopyKeyBytes {
		r.short, r.p = true, nil
		return nil
	}
	return r.value(n)
}

// DecodeCopyRequest is the inverse of AppendCopyRequest. Kinds Invalid, Unsupported.
func DecodeCopyRequest(p []byte, q *CopyRequest) error {
	r := &reader{p: p}
	*q = CopyRequest{Kind: CopyKind(r.u8())}
	if r.u8() != 0 || r.u16() != 0 {
		return block.Errorf(block.Unsupported, "a copy's question with flags")
	}
	q.ID, q.Group, q.View = r.u64(), block.GroupID(r.u64()), r.u64()
	switch q.Kind {
	case CopyOpen:
		q.Replica, q.At = block.ReplicaID(r.u64()), r.u64()
	case CopyScan:
		q.From, q.To = r.key(), r.key()
	case CopyData:
		n := int(r.u16())
		if n > MaxCopyRuns {
			return block.Errorf(block.Invalid, "a copy's question for %d runs", n)
		}
		blocks := 0
		for range n {
			if r.short {
				break
			}
			run := CopyRun{Key: r.key(), Skip: r.u8(), Count: r.u8()}
			blocks += int(run.Count)
			q.Runs = append(q.Runs, run)
		}
		if blocks > MaxCopyBlocks || blocks == 0 && !r.short {
			return block.Errorf(block.Invalid, "a copy's question for %d blocks", blocks)
		}
	case CopyClose:
	default:
		return block.Errorf(block.Unsupported, "a copy's question of kind %d", q.Kind)
	}
	return r.end("a copy's question")
}

// AppendCopyAnswer appends the encoding of a to dst.
func AppendCopyAnswer(dst []byte, a *CopyAnswer) []byte {
	dst = append(dst, byte(a.Status), 0, 0, 0)
	dst = appendU64(dst, a.ID)
	dst = appendU64(dst, a.View)
	dst = appendU64(dst, a.Bytes)
	dst = append(append(dst, byte(len(a.Next))), a.Next...)
	dst = appendU32(dst, uint32(len(a.Records)))
	for i := range a.Records {
		rec := &a.Records[i]
		dst = append(append(dst, byte(len(rec.Key))), rec.Key...)
		dst = appendU32(dst, uint32(len(rec.Value)))
		dst = append(dst, rec.Value...)
	}
	return dst
}

// DecodeCopyAnswer is the inverse of AppendCopyAnswer. Records share no memory
// with p. Kinds Invalid, Unsupported.
func DecodeCopyAnswer(p []byte, a *CopyAnswer) error {
	r := &reader{p: p}
	*a = CopyAnswer{Status: CopyStatus(r.u8())}
	if a.Status < CopyOK || a.Status > CopyFailed || r.u8() != 0 || r.u16() != 0 {
		return block.Errorf(block.Unsupported, "a copy's answer with status %d, or flags", a.Status)
	}
	a.ID, a.View, a.Bytes = r.u64(), r.u64(), r.u64()
	if a.Next = r.key(); len(a.Next) == 0 {
		a.Next = nil
	}
	n := r.u32()
	if uint64(n)*5 > uint64(len(r.p)) {
		return block.Errorf(block.Invalid, "a copy's answer of %d records in %d bytes", n, len(r.p))
	}
	for range n {
		if r.short {
			break
		}
		rec := CopyRecord{Key: r.key()}
		size := r.u32()
		if uint64(size) > uint64(len(r.p)) {
			r.short = true
			break
		}
		rec.Value = r.value(int(size))
		a.Records = append(a.Records, rec)
	}
	return r.end("a copy's answer")
}
