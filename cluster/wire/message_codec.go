package wire

import (
	"firn.io/firn/internal/block"
)

// maxTextBytes bounds Response.Text; longer ones are cut.
const maxTextBytes = 1 << 10

// MaxMapChunks bounds the chunks that one ReqMap spans by what a response's
// Covered can skip; it is a chunk range, not a number of chunks of the group.
const MaxMapChunks = block.ChunksPerSpan

const requestLeaderOnly = 1 << 0

// AppendRequest appends the encoded request to dst.
func AppendRequest(dst []byte, q *Request) []byte {
	var flags byte
	if q.LeaderOnly {
		flags |= requestLeaderOnly
	}
	dst = append(dst, byte(q.Kind), flags, 0, 0)
	dst = appendU64(dst, q.ID)
	dst = appendU64(dst, uint64(q.Group))
	dst = appendU64(dst, uint64(q.Layout))
	if q.Kind == ReqPropose {
		return AppendCommand(dst, &q.Command)
	}
	dst = append(dst, q.Volume[:]...)
	dst = appendU64(dst, uint64(q.Epoch))
	dst = appendU64(dst, uint64(q.Nonce))
	dst = appendU64(dst, uint64(q.Token))
	dst = appendU32(dst, uint32(q.Generation))
	dst = appendU32(dst, uint32(q.Chunk))
	dst = appendU32(dst, uint32(q.ToChunk))
	dst = appendU16(dst, uint16(q.Block))
	return appendU16(dst, q.Count)
}

// DecodeRequest decodes data into q, all fields of which it sets; q keeps
// nothing of data. On an error q.ID, q.Kind and q.Group are what could be read,
// so that it can be answered. Kinds Invalid and Unsupported.
func DecodeRequest(data []byte, q *Request) error {
	*q = Request{Command: Command{CRCs: q.Command.CRCs[:0]}}
	r := reader{p: data}
	q.Kind = RequestKind(r.u8())
	flags := r.u8()
	reserved := r.u16()
	q.ID = r.u64()
	q.Group = block.GroupID(r.u64())
	q.Layout = block.LayoutVersion(r.u64())
	q.LeaderOnly = flags&requestLeaderOnly != 0
	switch {
	case r.short:
		return block.Errorf(block.Invalid, "request of %d bytes is cut short", len(data))
	case flags&^requestLeaderOnly != 0 || reserved != 0:
		return block.Errorf(block.Unsupported, "request flags are not known to this build")
	}
	switch q.Kind {
	case ReqPropose:
		return DecodeCommand(r.p, &q.Command)
	case ReqRead, ReqMap, ReqRecord, ReqHealth:
	default:
		return block.Errorf(block.Unsupported, "request kind %d is not known to this build", q.Kind)
	}
	q.Volume = r.uuid()
	q.Epoch = block.Epoch(r.u64())
	q.Nonce = block.Nonce(r.u64())
	q.Token = block.Version(r.u64())
	q.Generation = block.Generation(r.u32())
	q.Chunk, q.ToChunk = block.Chunk(r.u32()), block.Chunk(r.u32())
	q.Block, q.Count = block.Index(r.u16()), r.u16()
	if err := r.end("request"); err != nil {
		return err
	}
	switch {
	case q.Kind == ReqRead && (q.Count == 0 || q.Count > MaxWriteBlocks || int(q.Block)+int(q.Count) > block.BlocksPerChunk):
		return block.Errorf(block.Invalid, "read of %d blocks from block %d of a chunk", q.Count, q.Block)
	case q.Kind == ReqMap && (q.Chunk >= q.ToChunk || q.ToChunk-q.Chunk > MaxMapChunks):
		return block.Errorf(block.Invalid, "map of the chunks %d to %d", q.Chunk, q.ToChunk)
	}
	return nil
}

// Sections of a response, in their order.
const (
	sectionText     = 1 << iota // length, bytes
	sectionResult               // outcome, version, replaced pair
	sectionRecord               // volume record
	sectionRuns                 // runs, checksums
	sectionHealth               // length, a health report
	knownSections   = sectionText | sectionResult | sectionRecord | sectionRuns | sectionHealth
	runBytes        = 9
	recordReadOnly  = 1 << 0
	recordTombstone = 1 << 1
)

// AppendResponse appends the encoded response to dst.
func AppendResponse(dst []byte, s *Response) []byte {
	text := s.Text[:min(len(s.Text), maxTextBytes)]
	rec := &s.Result.Record
	hasRecord := !rec.Volume.IsZero()
	var sections byte
	if text != "" {
		sections |= sectionText
	}
	if s.Result.Outcome != 0 {
		sections |= sectionResult
	}
	if hasRecord {
		sections |= sectionRecord
	}
	if len(s.Runs) > 0 || len(s.CRCs) > 0 {
		sections |= sectionRuns
	}
	if len(s.Health) > 0 {
		sections |= sectionHealth
	}
	dst = append(dst, byte(s.Status), sections, 0, 0)
	dst = appendU32(dst, uint32(s.Leader))
	dst = appendU64(dst, s.ID)
	dst = appendU64(dst, uint64(s.Group))
	dst = appendU64(dst, uint64(s.Applied))
	dst = appendU64(dst, uint64(s.NewLayout))
	dst = appendU32(dst, uint32(s.Covered))
	if sections&sectionText != 0 {
		dst = appendU16(dst, uint16(len(text)))
		dst = append(dst, text...)
	}
	if sections&sectionResult != 0 {
		dst = append(dst, byte(s.Result.Outcome))
		dst = appendU64(dst, uint64(s.Result.Version))
		dst = appendU64(dst, uint64(s.Result.ReplacedEpoch))
		dst = appendU64(dst, uint64(s.Result.ReplacedNonce))
	}
	if hasRecord {
		dst = appendRecord(dst, rec)
	}
	if sections&sectionRuns != 0 {
		dst = appendU32(dst, uint32(len(s.Runs)))
		dst = appendU32(dst, uint32(len(s.CRCs)))
		for _, run := range s.Runs {
			dst = appendU32(dst, uint32(run.Chunk))
			dst = appendU16(dst, uint16(run.Block))
			dst = appendU16(dst, run.Count)
			dst = append(dst, byte(run.State))
		}
		dst = appendCRCs(dst, s.CRCs)
	}
	if sections&sectionHealth != 0 {
		dst = appendU32(dst, uint32(len(s.Health)))
		dst = append(dst, s.Health...)
	}
	return dst
}

func appendRecord(dst []byte, rec *VolumeRecord) []byte {
	var flags byte
	if rec.ReadOnly {
		flags |= recordReadOnly
	}
	if rec.Tombstone {
		flags |= recordTombstone
	}
	dst = append(dst, flags)
	dst = append(dst, rec.Volume[:]...)
	dst = appendU64(dst, uint64(rec.Epoch))
	dst = appendU64(dst, uint64(rec.Nonce))
	dst = appendU32(dst, uint32(rec.Generation))
	dst = appendU64(dst, uint64(rec.Size))
	dst = appendU64(dst, uint64(rec.Settings))
	dst = appendU32(dst, uint32(len(rec.VolumeValue)))
	return append(dst, rec.VolumeValue...)
}

// DecodeResponse decodes data into s, all fields of which it sets; s keeps
// nothing of data. The capacities of s.Runs and s.CRCs are used again. On an
// error s.ID is what could be read. Kinds Invalid and Unsupported.
func DecodeResponse(data []byte, s *Response) error {
	*s = Response{Runs: s.Runs[:0], CRCs: s.CRCs[:0]}
	r := reader{p: data}
	s.Status = Status(r.u8())
	sections := r.u8()
	reserved := r.u16()
	s.Leader = block.NodeID(r.u32())
	s.ID = r.u64()
	s.Group = block.GroupID(r.u64())
	s.Applied = block.Version(r.u64())
	s.NewLayout = block.LayoutVersion(r.u64())
	s.Covered = block.Chunk(r.u32())
	switch {
	case r.short:
		return block.Errorf(block.Invalid, "response of %d bytes is cut short", len(data))
	case sections&^knownSections != 0 || reserved != 0:
		return block.Errorf(block.Unsupported, "response sections %#x are not known to this build", sections)
	}
	if sections&sectionText != 0 {
		n := r.u16()
		if n > maxTextBytes {
			return block.Errorf(block.Invalid, "response text of %d bytes", n)
		}
		s.Text = string(r.take(int(n)))
	}
	if sections&sectionResult != 0 {
		s.Result.Outcome = Outcome(r.u8())
		s.Result.Version = block.Version(r.u64())
		s.Result.ReplacedEpoch = block.Epoch(r.u64())
		s.Result.ReplacedNonce = block.Nonce(r.u64())
	}
	if sections&sectionRecord != 0 {
		if err := decodeRecord(&r, &s.Result.Record); err != nil {
			return err
		}
	}
	if sections&sectionRuns != 0 {
		if err := s.decodeRuns(&r); err != nil {
			return err
		}
	}
	if sections&sectionHealth != 0 {
		n := r.u32()
		if n > MaxHealthBytes {
			return block.Errorf(block.Invalid, "health report of %d bytes", n)
		}
		s.Health = r.value(int(n))
	}
	return r.end("response")
}

func decodeRecord(r *reader, rec *VolumeRecord) error {
	flags := r.u8()
	rec.ReadOnly, rec.Tombstone = flags&recordReadOnly != 0, flags&recordTombstone != 0
	rec.Volume = r.uuid()
	rec.Epoch = block.Epoch(r.u64())
	rec.Nonce = block.Nonce(r.u64())
	rec.Generation = block.Generation(r.u32())
	rec.Size = int64(r.u64())
	rec.Settings = block.SettingsCounter(r.u64())
	n := r.u32()
	if n > MaxVolumeValueBytes || flags&^(recordReadOnly|recordTombstone) != 0 || rec.Size < 0 || rec.Size > block.MaxVolumeBytes {
		return block.Errorf(block.Invalid, "volume record of %d bytes with flags %#x and a value of %d bytes", rec.Size, flags, n)
	}
	rec.VolumeValue = r.value(int(n))
	return nil
}

func (s *Response) decodeRuns(r *reader) error {
	runs, crcs := r.u32(), r.u32()
	if runs > MaxRuns || crcs > MaxWriteBlocks {
		return block.Errorf(block.Invalid, "response of %d runs and %d checksums", runs, crcs)
	}
	if len(r.p) < int(runs)*runBytes+int(crcs)*4 {
		r.short = true
		return nil
	}
	if cap(s.Runs) < int(runs) {
		s.Runs = make([]Run, 0, runs)
	}
	for range runs {
		run := Run{Chunk: block.Chunk(r.u32()), Block: block.Index(r.u16()), Count: r.u16(), State: block.ExtentState(r.u8())}
		if run.Count == 0 || int(run.Block)+int(run.Count) > block.BlocksPerChunk || run.State > block.Zero {
			return block.Errorf(block.Invalid, "run of %d blocks from block %d in state %d", run.Count, run.Block, run.State)
		}
		s.Runs = append(s.Runs, run)
	}
	s.CRCs = r.crcs(s.CRCs, int(crcs))
	return nil
}
