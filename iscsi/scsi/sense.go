package scsi

import (
	"encoding/binary"

	"firn.io/firn/internal/block"
)

// Sense keys (SPC-4, 4.5.6).
const (
	keyNone      = 0x0
	keyNotReady  = 0x2
	keyMedium    = 0x3
	keyHardware  = 0x4
	keyIllegal   = 0x5
	keyAttention = 0x6
	keyProtect   = 0x7
	keyCopy      = 0xa
	keyAborted   = 0xb
	keyMiscmp    = 0xe
)

// Code is an additional sense code and its qualifier.
type Code uint16

// The additional sense codes that are used (SPC-4, annex F).
const (
	ascNone                Code = 0x0000
	ascNotReadyTransition  Code = 0x0401
	ascStandby             Code = 0x040b
	ascWriteError          Code = 0x0c00
	ascUnreachableCopy     Code = 0x0d02
	ascUnrecoveredRead     Code = 0x1100
	ascParameterListLength Code = 0x1a00
	ascMiscompare          Code = 0x1d00
	ascInvalidOpcode       Code = 0x2000
	ascLBAOutOfRange       Code = 0x2100
	ascInvalidFieldCDB     Code = 0x2400
	ascLUNotSupported      Code = 0x2500
	ascInvalidFieldList    Code = 0x2600
	ascInvalidRelease      Code = 0x2604
	ascTooManyTargets      Code = 0x2606
	ascUnknownTargetType   Code = 0x2607
	ascTooManySegments     Code = 0x2608
	ascUnknownSegmentType  Code = 0x2609
	ascInlineData          Code = 0x260b
	ascWriteProtected      Code = 0x2700
	ascSpaceAllocation     Code = 0x2707
	// AttentionPowerOn is queued for a nexus that is new.
	AttentionPowerOn Code = 0x2900
	// AttentionReset is queued for all nexuses after LOGICAL UNIT RESET.
	AttentionReset Code = 0x2903
	// AttentionNexusLoss is queued for a session that was reinstated.
	AttentionNexusLoss         Code = 0x2907
	attentionMode              Code = 0x2a01
	attentionReservationsClear Code = 0x2a03
	attentionReleased          Code = 0x2a04
	attentionPreempted         Code = 0x2a05
	attentionAccessState       Code = 0x2a06
	attentionCapacity          Code = 0x2a09
	// AttentionCleared is queued for the others whose tasks CLEAR TASK SET ended.
	AttentionCleared Code = 0x2f00
	// AttentionLUNs says that the target's inventory of logical units changed.
	AttentionLUNs            Code = 0x3f0e
	ascInsufficientRegs      Code = 0x5504
	ascInternal              Code = 0x4400
	ascDataPhase             Code = 0x4b00
	ascSetPortGroupsFailed   Code = 0x670a
	ascInsufficientResources Code = 0x5503
)

// sense is what a CHECK CONDITION tells. info, if valid, is the INFORMATION
// field; field, if >= 0, points at the byte that was wrong: of the CDB if inCDB,
// else of the parameter list.
type sense struct {
	key       byte
	code      Code
	info      uint64
	infoValid bool
	field     int
	inCDB     bool
}

// SenseLen is the length of all sense data made here.
const SenseLen = 32

// appendTo encodes the sense data: fixed format (SPC-4, 4.5.3), or descriptor
// format (4.5.2).
func (s sense) appendTo(dst []byte, descriptor bool) []byte {
	if !descriptor {
		var b [18]byte
		b[0] = 0x70
		if s.infoValid && s.info <= 0xffffffff {
			b[0] |= 0x80
			binary.BigEndian.PutUint32(b[3:], uint32(s.info))
		}
		b[2], b[7] = s.key, 10
		binary.BigEndian.PutUint16(b[12:], uint16(s.code))
		s.putField(b[15:])
		return append(dst, b[:]...)
	}
	at := len(dst)
	dst = append(dst, 0x72, s.key, byte(s.code>>8), byte(s.code), 0, 0, 0, 0)
	if s.infoValid {
		dst = append(dst, 0x00, 0x0a, 0x80, 0)
		dst = binary.BigEndian.AppendUint64(dst, s.info)
	}
	if s.field >= 0 && s.key == keyIllegal {
		dst = append(dst, 0x02, 0x06, 0, 0, 0, 0, 0, 0)
		s.putField(dst[len(dst)-4:])
	}
	dst[at+7] = byte(len(dst) - at - 8)
	return dst
}

// putField writes the sense-key specific bytes (SPC-4, 4.5.2.4.2).
func (s sense) putField(b []byte) {
	if s.field < 0 || s.key != keyIllegal {
		return
	}
	b[0] = 0x80
	if s.inCDB {
		b[0] |= 0x40
	}
	binary.BigEndian.PutUint16(b[1:], uint16(s.field))
}

// InvalidOpcode is the sense data for a command that a transport refuses.
func InvalidOpcode() []byte { return illegal(ascInvalidOpcode).appendTo(nil, false) }

// DataPhaseError is the sense data for a command whose data did not come as
// agreed on.
func DataPhaseError() []byte {
	return sense{key: keyAborted, code: ascDataPhase, field: -1}.appendTo(nil, false)
}

func illegal(code Code) sense          { return sense{key: keyIllegal, code: code, field: -1} }
func invalidCDB(at int) sense          { return sense{keyIllegal, ascInvalidFieldCDB, 0, false, at, true} }
func invalidList(at int) sense         { return sense{keyIllegal, ascInvalidFieldList, 0, false, at, false} }
func attention(code Code) sense        { return sense{key: keyAttention, code: code, field: -1} }
func notReady(code Code) sense         { return sense{key: keyNotReady, code: code, field: -1} }
func withInfo(s sense, n uint64) sense { s.info, s.infoValid = n, true; return s }

// translate is how Firn's kinds of errors are told to an initiator. What may
// pass is told so that initiators try again: BUSY, or NOT READY for one that
// has other paths. lba goes into the INFORMATION field of bad blocks.
func translate(err error, lba uint64, write bool) (Status, sense) {
	switch block.KindOf(err) {
	case block.OutOfRange:
		return CheckCondition, withInfo(illegal(ascLBAOutOfRange), lba)
	case block.ReadOnly:
		return CheckCondition, sense{key: keyProtect, code: ascWriteProtected, field: -1}
	case block.NoSpace:
		return CheckCondition, sense{key: keyProtect, code: ascSpaceAllocation, field: -1}
	case block.Fenced, block.NotFound:
		return CheckCondition, notReady(ascStandby)
	case block.Unavailable, block.Busy:
		return Busy, sense{}
	case block.Corrupt:
		if write {
			return CheckCondition, withInfo(sense{key: keyMedium, code: ascWriteError, field: -1}, lba)
		}
		return CheckCondition, withInfo(sense{key: keyMedium, code: ascUnrecoveredRead, field: -1}, lba)
	case block.Invalid, block.Unsupported:
		return CheckCondition, illegal(ascInvalidFieldCDB)
	case block.Canceled:
		return TaskAborted, sense{}
	}
	return CheckCondition, sense{key: keyHardware, code: ascInternal, field: -1}
}
