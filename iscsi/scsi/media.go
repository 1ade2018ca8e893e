package scsi

import (
	"bytes"

	"firn.io/firn/internal/block"
)

// lbaRange is what a CDB addresses.
type lbaRange struct {
	lba    uint64
	blocks uint32
	// protect is RDPROTECT or WRPROTECT: protection information is not kept.
	protect byte
	fua     bool
}

// parseRange reads the address and the length of commands that have them where
// READ has; it is false for others.
func parseRange(cdb []byte) (lbaRange, bool) {
	var r lbaRange
	switch cdb[0] {
	case opRead6, opWrite6:
		r.lba = uint64(cdb[1]&0x1f)<<16 | uint64(be16(cdb[2:]))
		r.blocks = uint32(cdb[4])
		if r.blocks == 0 {
			r.blocks = 256
		}
		return r, true
	case opRead10, opWrite10, opWriteVerify10, opVerify10, opPrefetch10, opSyncCache10, opWriteSame10:
		r.lba, r.blocks = uint64(be32(cdb[2:])), uint32(be16(cdb[7:]))
	case opRead12, opWrite12, opWriteVerify12, opVerify12:
		r.lba, r.blocks = uint64(be32(cdb[2:])), be32(cdb[6:])
	case opRead16, opWrite16, opOrWrite16, opWriteVerify16, opVerify16, opPrefetch16, opSyncCache16, opWriteSame16:
		r.lba, r.blocks = be64(cdb[2:]), be32(cdb[10:])
	case opCompareAndWrite:
		r.lba, r.blocks = be64(cdb[2:]), uint32(cdb[13])
	default:
		return r, false
	}
	r.protect, r.fua = cdb[1]>>5, cdb[1]&0x08 != 0
	return r, true
}

// readRange is parseRange for the READ commands only.
func readRange(cdb []byte) (lbaRange, bool) {
	if c := find(cdb); c == nil || len(cdb) < c.length {
		return lbaRange{}, false
	}
	switch cdb[0] {
	case opRead6, opRead10, opRead12, opRead16:
		return parseRange(cdb)
	}
	return lbaRange{}, false
}

// check parses the range of a command and refuses what cannot be done; it is
// false then. limit bounds the blocks, 0: no bound.
func (k *call) check(limit int64) (lbaRange, bool) {
	r, _ := parseRange(k.cdb)
	if r.protect != 0 {
		k.fail(invalidCDB(1))
		return r, false
	}
	if n := k.u.blocks(); r.lba > n || uint64(r.blocks) > n-r.lba || r.lba == n && r.blocks > 0 {
		k.fail(withInfo(illegal(ascLBAOutOfRange), r.lba))
		return r, false
	}
	if limit > 0 && int64(r.blocks)*k.u.blockBytes() > limit {
		k.fail(invalidCDB(k.lengthAt()))
		return r, false
	}
	return r, true
}

// lengthAt is where the CDB has its transfer length.
func (k *call) lengthAt() int {
	switch {
	case len(k.cdb) < 10:
		return 4
	case k.cdb[0] >= 0xa0:
		return 6
	case k.cdb[0] >= 0x80:
		return 10
	}
	return 7
}

func (r lbaRange) flags() block.Flags {
	if r.fua {
		return block.FUA
	}
	return 0
}

func (k *call) read() {
	r, ok := k.check(MaxTransferBytes)
	if !ok {
		return
	}
	bs := k.u.blockBytes()
	k.r.Wanted = int64(r.blocks) * bs
	n := min(k.r.Wanted, k.limit)
	if n == 0 {
		return
	}
	p := k.in
	if int64(cap(p)) < n {
		p = make([]byte, n)
	}
	p = p[:n]
	if err := k.readAt(p, int64(r.lba)*bs); err != nil {
		k.failed(err, r.lba, false)
		return
	}
	k.r.In = p
}

// writable is false, and the command failed, if nothing may be written.
func (k *call) writable() bool {
	if k.u.dev.Geometry().ReadOnly || k.u.softwareProtected() {
		k.fail(sense{key: keyProtect, code: ascWriteProtected, field: -1})
		return false
	}
	return true
}

// write stores what the initiator sent, in whole blocks. It also serves WRITE
// AND VERIFY: the device checks what it stores.
func (k *call) write() {
	r, ok := k.check(MaxTransferBytes)
	if !ok || !k.writable() {
		return
	}
	bs := k.u.blockBytes()
	p := k.out[:min(int64(len(k.out)), int64(r.blocks)*bs)/bs*bs]
	if len(p) == 0 {
		return
	}
	k.u.compare.RLock()
	err := k.writeAt(p, int64(r.lba)*bs, r.flags())
	k.u.compare.RUnlock()
	if err != nil {
		k.failed(err, r.lba, true)
	}
}

func (k *call) verify() {
	check := k.cdb[1] >> 1 & 3
	if check == 2 {
		k.fail(invalidCDB(1))
		return
	}
	limit := int64(0)
	if check != 0 {
		limit = MaxTransferBytes
	}
	r, ok := k.check(limit)
	if !ok {
		return
	}
	bs := k.u.blockBytes()
	want := k.out
	if need := k.r.Wanted; int64(len(want)) < need {
		k.fail(invalidCDB(k.lengthAt()))
		return
	}
	// The medium is read in any case: that is what VERIFY is for.
	buf := make([]byte, min(int64(r.blocks)*bs, optimalBytes))
	for done := int64(0); done < int64(r.blocks)*bs; done += int64(len(buf)) {
		p := buf[:min(int64(len(buf)), int64(r.blocks)*bs-done)]
		if err := k.readAt(p, int64(r.lba)*bs+done); err != nil {
			k.failed(err, r.lba+uint64(done/bs), false)
			return
		}
		for at := int64(0); check != 0 && at < int64(len(p)); at += bs {
			from := done + at
			if check == 3 {
				from = 0
			}
			if i := differ(p[at:at+bs], want[from:from+bs]); i >= 0 {
				k.fail(withInfo(sense{key: keyMiscmp, code: ascMiscompare, field: -1}, uint64(from)+uint64(i)))
				return
			}
		}
	}
}

// differ returns the first byte where a and b, of one length, differ, or -1.
func differ(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

func (k *call) prefetch() {
	r, ok := k.check(0)
	if !ok || k.u.prefetch == nil {
		return
	}
	bs := k.u.blockBytes()
	n := int64(r.blocks) * bs
	if n == 0 {
		n = (int64(k.u.blocks()) - int64(r.lba)) * bs
	}
	if err := k.u.prefetch.Prefetch(k.ctx, int64(r.lba)*bs, n); err != nil {
		k.failed(err, r.lba, false)
	}
}

func (k *call) syncCache() {
	r, ok := k.check(0)
	if !ok {
		return
	}
	if err := k.u.dev.Flush(k.ctx); err != nil {
		k.failed(err, r.lba, true)
	}
}

// writeSame repeats a block. Zeros, and blocks to unmap, cost nothing per block.
func (k *call) writeSame() {
	r, ok := k.check(maxWriteSameBytes)
	if !ok || !k.writable() {
		return
	}
	const anchor, unmap, ndob = 0x10, 0x08, 0x01
	if r.fua = false; k.cdb[1]&anchor != 0 || r.blocks == 0 { // WSNZ: a length of 0 is refused
		k.fail(invalidCDB(k.lengthAt()))
		return
	}
	bs := k.u.blockBytes()
	pattern := k.out
	noData := k.cdb[0] == opWriteSame16 && k.cdb[1]&ndob != 0
	if !noData && (k.offered != bs || int64(len(pattern)) < bs) {
		k.fail(invalidCDB(k.lengthAt()))
		return
	}
	off, n := int64(r.lba)*bs, int64(r.blocks)*bs
	k.u.compare.RLock()
	defer k.u.compare.RUnlock()
	var err error
	switch zero := noData || allZero(pattern[:bs]); {
	case zero && k.cdb[1]&unmap != 0:
		err = k.u.dev.Trim(k.ctx, off, n, 0)
	case zero:
		err = k.u.dev.WriteZeroes(k.ctx, off, n, 0)
	default:
		buf := bytes.Repeat(pattern[:bs], int(min(n, optimalBytes)/bs))
		for ; n > 0 && err == nil; off, n = off+int64(len(buf)), n-int64(len(buf)) {
			buf = buf[:min(int64(len(buf)), n)]
			err = k.writeAt(buf, off, 0)
		}
	}
	if err != nil {
		k.failed(err, r.lba, true)
	}
}

func allZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// unmap is UNMAP (SBC-3, 5.28). All descriptors are checked before the first
// one takes effect.
func (k *call) unmap() {
	if k.cdb[1]&1 != 0 {
		k.fail(invalidCDB(1))
		return
	}
	n := at7(k.cdb)
	if n == 0 {
		return
	}
	p := k.list(n)
	if len(p) < 8 || uint64(len(p)) < n {
		k.fail(illegal(ascParameterListLength))
		return
	}
	descriptors := p[8:]
	if have := int(be16(p[2:])); have < len(descriptors) {
		descriptors = descriptors[:have]
	}
	if !k.writable() {
		return
	}
	if len(descriptors)/16 > maxUnmapRanges {
		k.fail(invalidList(2))
		return
	}
	total := k.u.blocks()
	var sum uint64
	for d := descriptors; len(d) >= 16; d = d[16:] {
		lba, count := be64(d), uint64(be32(d[8:]))
		if lba > total || count > total-lba {
			k.fail(withInfo(illegal(ascLBAOutOfRange), lba))
			return
		}
		if sum += count; sum > maxUnmapBlocks {
			k.fail(invalidList(8))
			return
		}
	}
	bs := k.u.blockBytes()
	k.u.compare.RLock()
	defer k.u.compare.RUnlock()
	for d := descriptors; len(d) >= 16; d = d[16:] {
		lba, count := be64(d), int64(be32(d[8:]))
		if count == 0 {
			continue
		}
		if err := k.u.dev.Trim(k.ctx, int64(lba)*bs, count*bs, 0); err != nil {
			k.failed(err, lba, true)
			return
		}
	}
}

// compareAndWrite is atomic against all that changes the unit (SBC-3, 5.2).
func (k *call) compareAndWrite() {
	r, _ := parseRange(k.cdb)
	if r.blocks > maxCompareBlocks {
		k.fail(invalidCDB(13))
		return
	}
	r, ok := k.check(0)
	if !ok || !k.writable() {
		return
	}
	bs := k.u.blockBytes()
	n := int64(r.blocks) * bs
	if k.offered != 2*n || int64(len(k.out)) < 2*n {
		k.fail(invalidCDB(13))
		return
	}
	if n == 0 {
		return
	}
	want, p := k.out[:n], k.out[n:2*n]
	have := make([]byte, n)
	k.u.compare.Lock()
	defer k.u.compare.Unlock()
	if err := k.readAt(have, int64(r.lba)*bs); err != nil {
		k.failed(err, r.lba, false)
		return
	}
	if i := differ(have, want); i >= 0 {
		k.fail(withInfo(sense{key: keyMiscmp, code: ascMiscompare, field: -1}, uint64(i)))
		return
	}
	if err := k.writeAt(p, int64(r.lba)*bs, r.flags()); err != nil {
		k.failed(err, r.lba, true)
	}
}

// orWrite is ORWRITE (16): the data is or-ed into what is there.
func (k *call) orWrite() {
	r, ok := k.check(MaxTransferBytes)
	if !ok || !k.writable() {
		return
	}
	bs := k.u.blockBytes()
	p := k.out[:min(int64(len(k.out)), int64(r.blocks)*bs)/bs*bs]
	if len(p) == 0 {
		return
	}
	have := make([]byte, len(p))
	k.u.compare.Lock()
	defer k.u.compare.Unlock()
	if err := k.readAt(have, int64(r.lba)*bs); err != nil {
		k.failed(err, r.lba, false)
		return
	}
	for i := range have {
		have[i] |= p[i]
	}
	if err := k.writeAt(have, int64(r.lba)*bs, r.flags()); err != nil {
		k.failed(err, r.lba, true)
	}
}

// lbaStatus is GET LBA STATUS (SBC-3, 5.5).
func (k *call) lbaStatus() {
	lba, total := be64(k.cdb[2:]), k.u.blocks()
	if lba >= total {
		k.fail(withInfo(illegal(ascLBAOutOfRange), lba))
		return
	}
	allocated := uint64(be32(k.cdb[10:]))
	const headerLen, descriptorLen = 8, 16
	room := max(1, (int(min(allocated, maxInBytes))-headerLen)/descriptorLen)
	bs := k.u.blockBytes()
	extents, err := k.u.dev.Extents(k.ctx, nil, int64(lba)*bs, int64(total-lba)*bs, 2*room)
	if err != nil {
		k.failed(err, lba, false)
		return
	}
	out := make([]byte, headerLen, headerLen+room*descriptorLen)
	for _, run := range mapped(extents, bs) {
		if len(out) == cap(out) {
			break
		}
		out = appendBE32(appendBE64(out, lba), run.blocks)
		out = append(out, run.state, 0, 0, 0)
		lba += uint64(run.blocks)
	}
	putBE32(out, uint32(len(out)-4))
	k.answer(out, allocated)
}

// Provisioning states of GET LBA STATUS.
const (
	stateMapped      = 0
	stateDeallocated = 1
)

type lbaRun struct {
	blocks uint32
	state  byte
}

// mapped turns extents into runs of whole blocks. A block that is part data is
// mapped; a run that does not fit its field ends the list.
func mapped(extents []block.Extent, bs int64) []lbaRun {
	var runs []lbaRun
	var at, end int64 // bytes of extents, bytes of runs
	for _, e := range extents {
		at += e.Bytes
		state, to := byte(stateMapped), (at+bs-1)/bs*bs
		if e.State != block.Data {
			state, to = stateDeallocated, at/bs*bs
		}
		n := (to - end) / bs
		if n <= 0 {
			continue
		}
		if last := len(runs) - 1; last >= 0 && runs[last].state == state && int64(runs[last].blocks)+n <= 1<<32-1 {
			runs[last].blocks += uint32(n)
		} else {
			runs = append(runs, lbaRun{uint32(min(n, 1<<32-1)), state})
		}
		if n > 1<<32-1 {
			break
		}
		end = to
	}
	return runs
}
