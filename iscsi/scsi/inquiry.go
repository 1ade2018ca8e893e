package scsi

import (
	"encoding/binary"
	"fmt"

	"firn.io/firn/internal/block"
)

// What a unit calls itself.
const (
	vendor  = "FIRN"
	product = "VOLUME"
)

// Peripheral qualifier and device type, byte 0 of INQUIRY data.
const (
	peripheralDisk = 0x00
	peripheralNone = 0x7f // no unit, of unknown type
)

// VPD pages.
const (
	vpdSupported     = 0x00
	vpdSerial        = 0x80
	vpdIdentity      = 0x83
	vpdExtended      = 0x86
	vpdPolicy        = 0x87
	vpdPorts         = 0x88
	vpdThirdParty    = 0x8f
	vpdLimits        = 0xb0
	vpdCharacter     = 0xb1
	vpdProvisioning  = 0xb2
	scsiNameString   = 0x8
	portIdentifier   = 0x4
	groupIdentifier  = 0x5
	associationPort  = 0x10
	codeSetBinary    = 0x1
	codeSetASCII     = 0x2
	codeSetUTF8      = 0x3
	protocolISCSI    = 0x50
	protocolValid    = 0x80
	vendorIdentifier = 0x1
	naaIdentifier    = 0x3
)

func appendBE16(dst []byte, v uint16) []byte { return binary.BigEndian.AppendUint16(dst, v) }
func appendBE32(dst []byte, v uint32) []byte { return binary.BigEndian.AppendUint32(dst, v) }
func appendBE64(dst []byte, v uint64) []byte { return binary.BigEndian.AppendUint64(dst, v) }
func putBE16(p []byte, v uint16)             { binary.BigEndian.PutUint16(p, v) }
func putBE32(p []byte, v uint32)             { binary.BigEndian.PutUint32(p, v) }

// appendPadded appends s as n characters, filled up with blanks.
func appendPadded(dst []byte, s string, n int) []byte {
	return append(dst, fmt.Sprintf("%-*.*s", n, n, s)...)
}

// NoUnit answers a command for a LUN where nothing is (SPC-4, 6.6.1; SAM-5,
// 4.12): INQUIRY and REQUEST SENSE say so, all else fails. luns is for REPORT
// LUNS, which any LUN answers.
func NoUnit(cdb []byte, luns []uint16, limit int64) Result {
	k := &call{u: &Unit{}, cdb: cdb, limit: limit}
	c := find(cdb)
	if c == nil || len(cdb) < c.length {
		k.fail(illegal(ascLUNotSupported))
		return k.r
	}
	switch cdb[0] {
	case opInquiry:
		if cdb[1]&1 != 0 || cdb[2] != 0 {
			k.fail(illegal(ascLUNotSupported))
			return k.r
		}
		k.answer(appendInquiry(nil, peripheralNone, ""), uint64(be16(cdb[3:])))
	case opRequestSense:
		k.answer(illegal(ascLUNotSupported).appendTo(nil, cdb[1]&1 != 0), uint64(cdb[4]))
	case opReportLUNs:
		k.luns(luns)
	default:
		k.fail(illegal(ascLUNotSupported))
	}
	return k.r
}

// ReportLUNs is REPORT LUNS of a target that has luns, in ascending order.
func ReportLUNs(cdb []byte, luns []uint16, limit int64) Result {
	k := &call{u: &Unit{}, cdb: cdb, limit: limit}
	k.luns(luns)
	return k.r
}

// IsReportLUNs tells whether the transport answers the command, which alone
// knows all units.
func IsReportLUNs(cdb []byte) bool {
	c := find(cdb)
	return c != nil && c.opcode == opReportLUNs && len(cdb) >= c.length
}

func (k *call) luns(luns []uint16) {
	allocated := uint64(be32(k.cdb[6:]))
	switch k.cdb[2] {
	case 0, 2:
	case 1: // well-known units only: there are none
		luns = nil
	default:
		k.fail(invalidCDB(2))
		return
	}
	if allocated < 16 {
		k.fail(invalidCDB(6))
		return
	}
	out := make([]byte, 8, 8+8*len(luns))
	putBE32(out, uint32(8*len(luns)))
	for _, lun := range luns {
		out = appendBE64(out, EncodeLUN(lun))
	}
	k.answer(out, allocated)
}

// reportLUNs serves a unit that is used without a target around it.
func (k *call) reportLUNs() { k.luns([]uint16{0}) }

// MaxLUN is the highest LUN that flat addressing has.
const MaxLUN = 1<<14 - 1

// EncodeLUN gives the 8 bytes of a LUN (SAM-5, 4.7): peripheral addressing up to
// 255, flat addressing above.
func EncodeLUN(lun uint16) uint64 {
	if lun > 255 {
		return uint64(lun|0x4000) << 48
	}
	return uint64(lun) << 48
}

// DecodeLUN reads what EncodeLUN makes, and small flat ones.
func DecodeLUN(v uint64) (uint16, bool) {
	lun := uint16(v >> 48)
	if v<<16 != 0 {
		return 0, false
	}
	switch lun >> 14 {
	case 0:
		return lun, lun <= 255
	case 1:
		return lun & MaxLUN, true
	}
	return 0, false
}

func appendInquiry(dst []byte, peripheral byte, revision string) []byte {
	dst = append(dst, peripheral, 0, 6 /* SPC-4 */, 0x12 /* HISUP, format 2 */, 0,
		0x18 /* TPGS implicit, 3PC */, 0, 0x02 /* CMDQUE */)
	dst = appendPadded(dst, vendor, 8)
	dst = appendPadded(dst, product, 16)
	dst = appendPadded(dst, revision, 4)
	dst = append(dst, make([]byte, 58-36)...)
	for _, version := range []uint16{0x00a0 /* SAM-5 */, 0x0960 /* iSCSI */, 0x0460 /* SPC-4 */, 0x04c0 /* SBC-3 */} {
		dst = appendBE16(dst, version)
	}
	dst = append(dst, make([]byte, 96-len(dst))...)
	dst[4] = byte(len(dst) - 5)
	return dst
}

func (k *call) inquiry() {
	allocated := uint64(be16(k.cdb[3:]))
	if k.cdb[1]&1 == 0 {
		if k.cdb[2] != 0 {
			k.fail(invalidCDB(2))
			return
		}
		k.answer(appendInquiry(nil, peripheralDisk, k.u.revision), allocated)
		return
	}
	page, ok := k.vpd(k.cdb[2])
	if !ok {
		k.fail(invalidCDB(2))
		return
	}
	out := append([]byte{peripheralDisk, k.cdb[2], 0, 0}, page...)
	putBE16(out[2:], uint16(len(page)))
	k.answer(out, allocated)
}

// vpd gives a page from byte 4 on.
func (k *call) vpd(page byte) ([]byte, bool) {
	g := k.u.dev.Geometry()
	switch page {
	case vpdSupported:
		return []byte{vpdSupported, vpdSerial, vpdIdentity, vpdExtended, vpdPolicy, vpdPorts, vpdThirdParty, vpdLimits, vpdCharacter, vpdProvisioning}, true
	case vpdSerial:
		return []byte(g.ID.String()), true
	case vpdIdentity:
		return k.identity(g), true
	case vpdExtended:
		p := make([]byte, 60)
		p[1] = 0x07 // SIMPSUP, ORDSUP, HEADSUP
		p[3] = 0x01 // LUICLR
		return p, true
	case vpdPolicy: // the mode pages are shared by all nexuses
		return []byte{0x3f, 0xff, 0, 4, 0, 0, 0, 0}, true
	case vpdPorts:
		return k.ports(), true
	case vpdThirdParty:
		return thirdParty(), true
	case vpdLimits:
		return k.limits(), true
	case vpdCharacter:
		p := make([]byte, 60)
		putBE16(p, 1) // not rotating
		return p, true
	case vpdProvisioning:
		const unmap, same16, same10, zero = 0x80, 0x40, 0x20, 0x04
		return []byte{0, unmap | same16 | same10 | zero, 2 /* thin */, 0}, true
	}
	return nil, false
}

// identity is the device identification page (SPC-4, 7.8.6): the same through
// all ports and gateways but for what names the port.
func (k *call) identity(g block.Geometry) []byte {
	naa := g.ID
	naa[0] = naa[0]&0x0f | 0x30 // locally assigned
	p := appendDesignator(nil, codeSetBinary, naaIdentifier, naa[:8])
	p = appendDesignator(p, codeSetASCII, vendorIdentifier, []byte(fmt.Sprintf("%-8s%s", vendor, g.ID)))
	if k.n == nil {
		return p
	}
	p = appendDesignator(p, codeSetBinary|protocolISCSI, protocolValid|associationPort|portIdentifier, appendBE16([]byte{0, 0}, k.n.Port))
	p = appendDesignator(p, codeSetBinary|protocolISCSI, protocolValid|associationPort|groupIdentifier, appendBE16([]byte{0, 0}, k.n.Group))
	return appendDesignator(p, codeSetUTF8|protocolISCSI, protocolValid|associationPort|scsiNameString, k.portName())
}

// portName is the SCSI name string of the target port: null-terminated, padded.
func (k *call) portName() []byte {
	s := fmt.Sprintf("%s,t,0x%04x\x00", k.n.TargetName, k.n.Tag)
	return append([]byte(s), make([]byte, (4-len(s)%4)%4)...)
}

func appendDesignator(dst []byte, set, kind byte, id []byte) []byte {
	return append(append(dst, set, kind, 0, byte(len(id))), id...)
}

// ports is the SCSI ports page (SPC-4, 7.8.14): the port that asks.
func (k *call) ports() []byte {
	if k.n == nil {
		return nil
	}
	p := appendBE16([]byte{0, 0}, k.n.Port)
	p = append(p, 0, 0, 0, 0, 0, 0)
	name := appendDesignator(nil, codeSetUTF8|protocolISCSI, protocolValid|associationPort|scsiNameString, k.portName())
	return append(appendBE16(p, uint16(len(name))), name...)
}

// limits is the block limits page (SBC-3, 6.5.3), in logical blocks.
func (k *call) limits() []byte {
	bs := uint32(k.u.blockBytes())
	p := make([]byte, 60)
	p[0] = 1 // WSNZ
	p[1] = maxCompareBlocks
	granularity := max(1, block.Size/bs)
	putBE16(p[2:], uint16(granularity))
	putBE32(p[4:], MaxTransferBytes/bs)
	putBE32(p[8:], optimalBytes/bs)
	putBE32(p[12:], optimalBytes/bs) // prefetch
	putBE32(p[16:], maxUnmapBlocks)
	putBE32(p[20:], maxUnmapRanges)
	putBE32(p[24:], granularity)
	putBE32(p[28:], 1<<31) // UGAVALID, alignment 0
	binary.BigEndian.PutUint64(p[32:], maxWriteSameBytes/uint64(bs))
	return p
}

func (k *call) requestSense() {
	s := sense{field: -1}
	if code, ok := k.u.takeAttention(k.n); ok {
		s = attention(code)
	}
	k.answer(s.appendTo(nil, k.cdb[1]&1 != 0), uint64(k.cdb[4]))
}

func (k *call) readCapacity10() {
	if k.cdb[8]&1 == 0 && be32(k.cdb[2:]) != 0 {
		k.fail(invalidCDB(2))
		return
	}
	last := min(k.u.blocks()-1, 0xffffffff)
	k.answer(appendBE32(appendBE32(nil, uint32(last)), uint32(k.u.blockBytes())), 8)
}

func (k *call) readCapacity16() {
	if k.cdb[14]&1 == 0 && be64(k.cdb[2:]) != 0 {
		k.fail(invalidCDB(2))
		return
	}
	bs := uint32(k.u.blockBytes())
	p := appendBE32(appendBE64(make([]byte, 0, 32), k.u.blocks()-1), bs)
	exponent := byte(0)
	for b := bs; b < block.Size; b *= 2 {
		exponent++
	}
	const lbpme, lbprz = 0x80, 0x40
	p = append(p, 0, exponent, lbpme|lbprz, 0)
	k.answer(append(p, make([]byte, 16)...), uint64(be32(k.cdb[10:])))
}
