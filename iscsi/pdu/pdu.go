// Package pdu is the wire format of iSCSI (RFC 7143): the 48-byte basic header
// segment with its fields, and the text keys of login and text PDUs. It is pure:
// no socket, no clock, no allocation by a length that the peer claims.
package pdu

import (
	"encoding/binary"
	"fmt"
)

// HeaderLen is the length of a basic header segment (RFC 7143, 11.2.1).
const HeaderLen = 48

// DigestLen is the length of a header or data digest, CRC32C, little-endian.
const DigestLen = 4

// NoTag is the reserved value of initiator and target task tags.
const NoTag = 0xffffffff

// Opcode is the kind of a PDU (11.2.1.2).
type Opcode uint8

// The opcodes of initiators, then those of targets.
const (
	NopOut      Opcode = 0x00
	Command     Opcode = 0x01
	TaskMgmt    Opcode = 0x02
	Login       Opcode = 0x03
	Text        Opcode = 0x04
	DataOut     Opcode = 0x05
	Logout      Opcode = 0x06
	SNACK       Opcode = 0x10
	NopIn       Opcode = 0x20
	Response    Opcode = 0x21
	TaskMgmtRsp Opcode = 0x22
	LoginRsp    Opcode = 0x23
	TextRsp     Opcode = 0x24
	DataIn      Opcode = 0x25
	LogoutRsp   Opcode = 0x26
	R2T         Opcode = 0x31
	Async       Opcode = 0x32
	Reject      Opcode = 0x3f
)

var opcodeNames = map[Opcode]string{
	NopOut: "NOP-Out", Command: "SCSI Command", TaskMgmt: "Task Management Request", Login: "Login Request", Text: "Text Request",
	DataOut: "Data-Out", Logout: "Logout Request", SNACK: "SNACK", NopIn: "NOP-In", Response: "SCSI Response",
	TaskMgmtRsp: "Task Management Response", LoginRsp: "Login Response", TextRsp: "Text Response", DataIn: "Data-In",
	LogoutRsp: "Logout Response", R2T: "R2T", Async: "Async Message", Reject: "Reject",
}

func (o Opcode) String() string {
	if s, ok := opcodeNames[o]; ok {
		return s
	}
	return fmt.Sprintf("opcode %#02x", uint8(o))
}

// Bits of byte 1, by kind of PDU.
const (
	Final    = 0x80 // commands, Data-In and Data-Out, text, responses
	Transit  = 0x80 // login
	Continue = 0x40 // login, text
	Read     = 0x40 // command
	Write    = 0x20 // command

	AttrMask     = 0x07 // command: task attribute
	AttrOrdered  = 2
	AttrHead     = 3
	DataStatus   = 0x01 // Data-In: S, the PDU carries the status
	BidiOverflow = 0x10
	Overflow     = 0x04 // Response, Data-In
	Underflow    = 0x02
)

// Header is a basic header segment, in wire order. The zero Header is NOP-Out.
type Header [HeaderLen]byte

// Opcode returns the kind.
func (h *Header) Opcode() Opcode { return Opcode(h[0] & 0x3f) }

// Immediate tells whether the I bit is set.
func (h *Header) Immediate() bool { return h[0]&0x40 != 0 }

// SetOpcode sets the kind and clears the I bit.
func (h *Header) SetOpcode(o Opcode) { h[0] = byte(o) }

// Flags is byte 1.
func (h *Header) Flags() byte { return h[1] }

// Has tells whether all the bits of f are set in byte 1.
func (h *Header) Has(f byte) bool { return h[1]&f == f }

// AHSLen is the length of the additional header segments in bytes, 0..1020.
func (h *Header) AHSLen() int { return int(h[4]) * 4 }

// DataLen is the length of the data segment without padding, 0..2^24-1.
func (h *Header) DataLen() int { return int(h[5])<<16 | int(h[6])<<8 | int(h[7]) }

// SetDataLen sets the length of the data segment, which is below 2^24.
func (h *Header) SetDataLen(n int) { h[5], h[6], h[7] = byte(n>>16), byte(n>>8), byte(n) }

// LUN is bytes 8..15.
func (h *Header) LUN() uint64 { return binary.BigEndian.Uint64(h[8:]) }

// SetLUN sets bytes 8..15.
func (h *Header) SetLUN(lun uint64) { binary.BigEndian.PutUint64(h[8:], lun) }

// Word returns the big-endian 32 bits at byte offset at.
func (h *Header) Word(at int) uint32 { return binary.BigEndian.Uint32(h[at:]) }

// SetWord sets the 32 bits at byte offset at.
func (h *Header) SetWord(at int, v uint32) { binary.BigEndian.PutUint32(h[at:], v) }

// Offsets of words, for Word and SetWord.
const (
	AtITT          = 16 // all
	AtTTT          = 20 // NOP, Data-In, Data-Out, R2T, Text; SNACK
	AtRefTag       = 20 // task management: referenced task tag
	AtEDTL         = 20 // command: expected data transfer length
	AtCID          = 20 // login, logout: upper 16 bits
	AtCmdSN        = 24 // requests
	AtStatSN       = 24 // responses
	AtExpStatSN    = 28 // requests
	AtExpCmdSN     = 28 // responses
	AtMaxCmdSN     = 32 // responses
	AtRefCmdSN     = 32 // task management
	AtDataSN       = 36 // Data-In, Data-Out, Response (ExpDataSN), R2T (R2TSN), Reject
	AtBufferOffset = 40 // Data-In, Data-Out, R2T
	AtResidual     = 44 // Response, Data-In
	AtDesiredLen   = 44 // R2T
)

// ITT is the initiator task tag.
func (h *Header) ITT() uint32 { return h.Word(AtITT) }

// CDB is the first 16 bytes of the command descriptor block; longer ones go on
// in an additional header segment.
func (h *Header) CDB() []byte { return h[32:48] }

// Padded rounds n up to the 4 bytes that segments are padded to.
func Padded(n int) int { return (n + 3) &^ 3 }

// AHS types (11.2.2.1).
const (
	ahsExtendedCDB = 1
	ahsBidiRead    = 2
)

// ExtendCDB returns the whole CDB of a command: the 16 bytes of its header and
// those of an extended CDB in ahs, the additional header segments. The result
// may share h. It is an error when a segment is malformed or of another kind.
func ExtendCDB(h *Header, ahs []byte) ([]byte, error) {
	cdb := h.CDB()
	for len(ahs) > 0 {
		if len(ahs) < 4 {
			return nil, fmt.Errorf("pdu: %d bytes of additional header are no segment", len(ahs))
		}
		n, kind := int(binary.BigEndian.Uint16(ahs)), ahs[2]
		if n < 1 || 3+n > len(ahs) {
			return nil, fmt.Errorf("pdu: additional header segment of %d bytes in %d", n, len(ahs))
		}
		if kind != ahsExtendedCDB {
			return nil, fmt.Errorf("pdu: additional header segment of type %d is not supported", kind)
		}
		// Byte 3 is reserved; the length counts it.
		cdb = append(append(make([]byte, 0, 16+n-1), cdb...), ahs[4:3+n]...)
		ahs = ahs[min(len(ahs), Padded(3+n)):]
	}
	return cdb, nil
}
