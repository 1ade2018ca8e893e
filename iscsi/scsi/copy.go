package scsi

// Limits of EXTENDED COPY, as RECEIVE COPY RESULTS tells them.
const (
	maxCopyTargets  = 4
	maxCopySegments = 32
	maxCopyList     = 4096
	// maxCopyBytes bounds one segment, maxCopyChunk what is held in memory.
	maxCopyBytes = 64 << 20
	maxCopyChunk = optimalBytes
)

var copyResultsUsage = []byte{0x1f, 0xff, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0x04}

// Descriptor types of EXTENDED COPY (SPC-4, 6.4.5 and 6.4.6).
const (
	copyTargetIdentity  = 0xe4
	copyBlockToBlock    = 0x02
	targetLen           = 32
	blockToBlockLen     = 28
	copyHeaderLen       = 16
	copyStatusCompleted = 1
	copyStatusErrors    = 2
)

// copyResult is what the last copy through a nexus left for COPY STATUS.
type copyResult struct {
	id       byte
	known    bool
	failed   bool
	segments uint16
	bytes    uint64
}

// thirdParty is the third-party copy page (SPC-4, 7.8.17): what commands,
// descriptors and limits EXTENDED COPY has.
func thirdParty() []byte {
	descriptor := func(kind uint16, body []byte) []byte {
		for len(body)%4 != 0 {
			body = append(body, 0)
		}
		return append(appendBE16(appendBE16(nil, kind), uint16(len(body))), body...)
	}
	commands := []byte{7, opExtendedCopy, 1, actCopyLID1, opCopyResults, 4, actCopyStatus, actCopyReceiveData}
	commands = append(commands, actCopyParameters, actCopyFailedDetail)
	commands[0] = byte(len(commands) - 1)
	p := descriptor(0x0001, commands)

	parameters := make([]byte, 28)
	putBE16(parameters[4:], maxCopyTargets)
	putBE16(parameters[6:], maxCopySegments)
	putBE32(parameters[8:], maxCopyList)
	p = append(p, descriptor(0x0004, parameters)...)

	p = append(p, descriptor(0x0008, []byte{2, copyBlockToBlock, copyTargetIdentity})...)

	identifiers := make([]byte, 2)
	p = append(p, descriptor(0x000c, identifiers)...)

	general := make([]byte, 32)
	putBE32(general, 1) // concurrent copies
	general[4], general[5] = 20, 12
	return append(p, descriptor(0x8001, general)...)
}

// copyResults is RECEIVE COPY RESULTS (SPC-4, 6.21).
func (k *call) copyResults() {
	allocated := at10(k.cdb)
	id := k.cdb[2]
	if k.cdb[1]&0x1f == actCopyParameters {
		k.answer(copyParameters(), allocated)
		return
	}
	k.u.mu.Lock()
	last := k.u.copied[k.n]
	k.u.mu.Unlock()
	if !last.known || last.id != id {
		k.fail(invalidCDB(2))
		return
	}
	switch k.cdb[1] & 0x1f {
	case actCopyStatus:
		out := []byte{0, 0, 0, 8, copyStatusCompleted, 0, 0, 1}
		if last.failed {
			out[4] = copyStatusErrors
		}
		putBE16(out[5:], last.segments)
		mib := (last.bytes + 1<<20 - 1) >> 20
		out[7] = 2 // counted in MiB
		k.answer(appendBE32(out, uint32(mib)), allocated)
	case actCopyReceiveData, actCopyFailedDetail: // no data is held back
		k.answer([]byte{0, 0, 0, 0}, allocated)
	}
}

func copyParameters() []byte {
	out := make([]byte, 44)
	out[4] = 0x01 // SNLID
	putBE16(out[8:], maxCopyTargets)
	putBE16(out[10:], maxCopySegments)
	putBE32(out[12:], maxCopyList)
	putBE32(out[16:], maxCopyBytes)
	// inline, held and stream bytes are 0; so are total and device copies below
	putBE16(out[34:], 1)
	out[36] = 1 // concurrent copies
	out[37] = 20
	out[38], out[39] = 12, 12
	out = append(out[:43], 2, copyBlockToBlock, copyTargetIdentity)
	putBE32(out, uint32(len(out)-4))
	return out
}

// copySegment is one block to block segment.
type copySegment struct {
	from, to uint64
	blocks   uint16
}

// extendedCopy is EXTENDED COPY (LID1) within this unit: between two ranges of
// the volume, without the data going through the initiator.
func (k *call) extendedCopy() {
	n := at10(k.cdb)
	if n == 0 {
		return
	}
	p := k.list(n)
	if n > maxCopyList || uint64(len(p)) < n || len(p) < copyHeaderLen {
		k.fail(illegal(ascParameterListLength))
		return
	}
	segments, s, ok := k.parseCopy(p)
	if !ok {
		k.fail(s)
		return
	}
	if !k.writable() {
		return
	}
	result := copyResult{id: p[0], known: true}
	for _, seg := range segments {
		if err := k.copyBlocks(seg); err != nil {
			result.failed = true
			k.failed(err, seg.from, true)
			break
		}
		result.segments++
		result.bytes += uint64(seg.blocks) * uint64(k.u.blockBytes())
	}
	if p[1]>>3&3 != 3 { // NLID: the list has no identifier
		k.u.mu.Lock()
		k.u.copied[k.n] = result
		k.u.mu.Unlock()
	}
}

// parseCopy checks all of the list before anything is copied.
func (k *call) parseCopy(p []byte) ([]copySegment, sense, bool) {
	targetBytes, segmentBytes, inline := int(be16(p[2:])), uint64(be32(p[8:])), be32(p[12:])
	switch {
	case inline != 0:
		return nil, illegal(ascInlineData), false
	case targetBytes > maxCopyTargets*targetLen:
		return nil, illegal(ascTooManyTargets), false
	case segmentBytes > maxCopySegments*blockToBlockLen:
		return nil, illegal(ascTooManySegments), false
	case uint64(copyHeaderLen+targetBytes)+segmentBytes > uint64(len(p)) || targetBytes%targetLen != 0:
		return nil, illegal(ascParameterListLength), false
	}
	targets := p[copyHeaderLen:][:targetBytes]
	for t := targets; len(t) > 0; t = t[targetLen:] {
		if t[0] != copyTargetIdentity {
			return nil, illegal(ascUnknownTargetType), false
		}
		if s, ok := k.checkTarget(t[:targetLen]); !ok {
			return nil, s, false
		}
	}
	var segments []copySegment
	for s := p[copyHeaderLen+targetBytes:][:segmentBytes]; len(s) > 0; s = s[blockToBlockLen:] {
		if s[0] != copyBlockToBlock {
			return nil, illegal(ascUnknownSegmentType), false
		}
		if len(s) < blockToBlockLen || be16(s[2:]) != blockToBlockLen-4 {
			return nil, invalidList(copyHeaderLen + targetBytes), false
		}
		count := len(targets) / targetLen
		if int(be16(s[4:])) >= count || int(be16(s[6:])) >= count {
			return nil, sense{key: keyCopy, code: ascUnreachableCopy, field: -1}, false
		}
		seg := copySegment{from: be64(s[12:]), to: be64(s[20:]), blocks: be16(s[10:])}
		total := k.u.blocks()
		if seg.from > total || uint64(seg.blocks) > total-seg.from || seg.to > total || uint64(seg.blocks) > total-seg.to {
			return nil, withInfo(sense{key: keyCopy, code: ascNone, field: -1}, seg.from), false
		}
		if int64(seg.blocks)*k.u.blockBytes() > maxCopyBytes {
			return nil, invalidList(copyHeaderLen + targetBytes), false
		}
		segments = append(segments, seg)
	}
	return segments, sense{}, true
}

// checkTarget tells whether an identification descriptor (SPC-4, 6.4.5.4) names
// this unit, by any of its own designators.
func (k *call) checkTarget(t []byte) (sense, bool) {
	if t[1]&0x1f != 0 { // the type of device; what kind of LU id it has is not looked at
		return illegal(ascUnknownTargetType), false
	}
	set, kind, n := t[4]&0x0f, t[5]&0x3f, int(t[7])
	if n > 20 {
		return invalidList(copyHeaderLen), false
	}
	for own := k.identity(k.u.dev.Geometry()); len(own) >= 4; own = own[4+int(own[3]):] {
		if own[0]&0x0f != set || own[1]&0x3f != kind {
			continue
		}
		// A designator is cut to the 20 bytes that a descriptor has room for.
		if id := own[4:][:own[3]]; string(id[:min(len(id), 20)]) == string(t[8:8+n]) {
			return sense{}, true
		}
	}
	return sense{key: keyCopy, code: ascUnreachableCopy, field: -1}, false
}

func (k *call) copyBlocks(seg copySegment) error {
	bs := k.u.blockBytes()
	n := int64(seg.blocks) * bs
	if n == 0 {
		return nil
	}
	// The whole segment is read first if its ranges overlap: what it copies is
	// what was there when it began.
	step := min(n, maxCopyChunk)
	if overlap := seg.from < seg.to+uint64(seg.blocks) && seg.to < seg.from+uint64(seg.blocks); overlap {
		step = n
	}
	buf := make([]byte, step)
	k.u.compare.RLock()
	defer k.u.compare.RUnlock()
	for at := int64(0); at < n; at += step {
		p := buf[:min(step, n-at)]
		if err := k.readAt(p, int64(seg.from)*bs+at); err != nil {
			return err
		}
		if err := k.writeAt(p, int64(seg.to)*bs+at, 0); err != nil {
			return err
		}
	}
	return nil
}
