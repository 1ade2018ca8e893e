// Package wire encodes and decodes the messages of the NBD protocol. It does no
// I/O and keeps no state. All numbers are big endian; the specification is
// doc/proto.md of github.com/NetworkBlockDevice/nbd.
//
// Append functions extend dst as append does. Parse functions never keep or
// change their input; what they return as []byte points into it.
package wire

import (
	"errors"
	"fmt"
)

// The magic numbers.
const (
	magicNBD        = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption     = 0x49484156454f5054 // "IHAVEOPT"
	magicOptReply   = 0x0003e889045565a9
	magicRequest    = 0x25609513
	magicSimple     = 0x67446698
	magicStructured = 0x668e33ef
	magicExtRequest = 0x21e41c71
	magicExtReply   = 0x6e8a278c
)

// Lengths of fixed parts, and limits that the protocol sets, in bytes.
const (
	GreetingLen       = 18
	ClientFlagsLen    = 4
	OptionHeaderLen   = 16
	OptReplyHeaderLen = 20
	RequestLen        = 28
	SimpleReplyLen    = 16
	ChunkHeaderLen    = 20
	OffsetDataLen     = 8
	OffsetHoleLen     = 12
	ExtentLen         = 8
	// With extended headers.
	ExtRequestLen     = 32
	ExtChunkHeaderLen = 32
	ExtExtentLen      = 16
	// ExportNamePad is how many zero bytes follow the answer to EXPORT_NAME
	// unless both sides said NO_ZEROES.
	ExportNamePad = 124
	// MaxName bounds every string.
	MaxName = 4096
	// MaxPayload is the largest request and data reply that every peer accepts.
	MaxPayload = 32 << 20
)

// ErrMalformed is wrapped by every error of this package that the peer caused.
var ErrMalformed = errors.New("malformed NBD message")

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrMalformed, fmt.Sprintf(format, args...))
}

// HandshakeFlags are the server's, in its greeting.
type HandshakeFlags uint16

const (
	FixedNewstyle HandshakeFlags = 1 << 0
	NoZeroes      HandshakeFlags = 1 << 1
)

// ClientFlags answer HandshakeFlags.
type ClientFlags uint32

const (
	ClientFixedNewstyle ClientFlags = 1 << 0
	ClientNoZeroes      ClientFlags = 1 << 1
)

// Option is a client's request during the handshake.
type Option uint32

const (
	OptExportName      Option = 1
	OptAbort           Option = 2
	OptList            Option = 3
	OptStartTLS        Option = 5
	OptInfo            Option = 6
	OptGo              Option = 7
	OptStructuredReply Option = 8
	OptListMetaContext Option = 9
	OptSetMetaContext  Option = 10
	OptExtendedHeaders Option = 11
	// OptSession is Firn's own ("FIRN"); other servers do not know it and say
	// RepErrUnsup. Its data is a Session.
	OptSession Option = 0x4649524e
)

// OptReply is the type of an answer to an Option.
type OptReply uint32

const (
	RepAck         OptReply = 1
	RepServer      OptReply = 2
	RepInfo        OptReply = 3
	RepMetaContext OptReply = 4

	repErr              = OptReply(1 << 31)
	RepErrUnsup         = repErr | 1
	RepErrPolicy        = repErr | 2
	RepErrInvalid       = repErr | 3
	RepErrPlatform      = repErr | 4
	RepErrTLSRequired   = repErr | 5
	RepErrUnknown       = repErr | 6
	RepErrShutdown      = repErr | 7
	RepErrBlockSizeReqd = repErr | 8
	RepErrTooBig        = repErr | 9
	RepErrExtHeaderReqd = repErr | 10
)

// IsError tells whether the reply refuses the option.
func (r OptReply) IsError() bool { return r&repErr != 0 }

// InfoType names one kind of information about an export.
type InfoType uint16

const (
	InfoExport      InfoType = 0
	InfoName        InfoType = 1
	InfoDescription InfoType = 2
	InfoBlockSize   InfoType = 3
)

// ExportFlags are the transmission flags of an export.
type ExportFlags uint16

const (
	HasFlags        ExportFlags = 1 << 0
	ReadOnly        ExportFlags = 1 << 1
	SendFlush       ExportFlags = 1 << 2
	SendFUA         ExportFlags = 1 << 3
	Rotational      ExportFlags = 1 << 4
	SendTrim        ExportFlags = 1 << 5
	SendWriteZeroes ExportFlags = 1 << 6
	SendDF          ExportFlags = 1 << 7
	CanMultiConn    ExportFlags = 1 << 8
	SendResize      ExportFlags = 1 << 9
	SendCache       ExportFlags = 1 << 10
	SendFastZero    ExportFlags = 1 << 11
	// BlockStatusPayload lets BLOCK_STATUS name contexts; extended headers only.
	BlockStatusPayload ExportFlags = 1 << 12
)

// Command is the type of a request in the transmission phase.
type Command uint16

const (
	CmdRead        Command = 0
	CmdWrite       Command = 1
	CmdDisc        Command = 2
	CmdFlush       Command = 3
	CmdTrim        Command = 4
	CmdCache       Command = 5
	CmdWriteZeroes Command = 6
	CmdBlockStatus Command = 7
	// NumCommands is one more than the highest known command.
	NumCommands = 8
)

var commandNames = [NumCommands]string{"read", "write", "disconnect", "flush", "trim", "cache", "write_zeroes", "block_status"}

func (c Command) String() string {
	if c < NumCommands {
		return commandNames[c]
	}
	return fmt.Sprintf("command %d", uint16(c))
}

// CommandFlags modify a request.
type CommandFlags uint16

const (
	FlagFUA      CommandFlags = 1 << 0
	FlagNoHole   CommandFlags = 1 << 1
	FlagDF       CommandFlags = 1 << 2
	FlagReqOne   CommandFlags = 1 << 3
	FlagFastZero CommandFlags = 1 << 4
	// FlagPayloadLen, with extended headers, says that Length is that of a
	// payload; a write has it always.
	FlagPayloadLen CommandFlags = 1 << 5
)

// AllowedFlags returns the flags that make sense on c. FUA is tolerated on
// every command once the server offers it.
func (h Headers) AllowedFlags(c Command) CommandFlags {
	f := FlagFUA
	switch {
	case c == CmdRead && h != SimpleReplies:
		f |= FlagDF
	case c == CmdWrite && h == ExtendedHeaders:
		f |= FlagPayloadLen
	case c == CmdWriteZeroes:
		f |= FlagNoHole | FlagFastZero
	case c == CmdBlockStatus:
		f |= FlagReqOne
	}
	return f
}

// ChunkType is the type of a structured reply's chunk.
type ChunkType uint16

const (
	ChunkNone        ChunkType = 0
	ChunkOffsetData  ChunkType = 1
	ChunkOffsetHole  ChunkType = 2
	ChunkBlockStatus ChunkType = 5
	// ChunkBlockStatusExt takes its place with extended headers.
	ChunkBlockStatusExt ChunkType = 6
	chunkErr                      = ChunkType(1 << 15)
	ChunkError                    = chunkErr | 1
	ChunkErrorOffset              = chunkErr | 2
)

// IsStatus tells whether the chunk carries extents of a context.
func (t ChunkType) IsStatus() bool { return t == ChunkBlockStatus || t == ChunkBlockStatusExt }

// IsError tells whether the chunk carries an Errno.
func (t ChunkType) IsError() bool { return t&chunkErr != 0 }

// ChunkDone marks the last chunk of a reply.
const ChunkDone uint16 = 1 << 0

// Flags of an extent in the context base:allocation.
const (
	StateHole uint64 = 1 << 0
	StateZero uint64 = 1 << 1
)

// Errno is an error number on the wire. It is an error; 0 is success and is
// never returned as one.
type Errno uint32

const (
	EPERM     Errno = 1
	EIO       Errno = 5
	ENOMEM    Errno = 12
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	EOVERFLOW Errno = 75
	ENOTSUP   Errno = 95
	ESHUTDOWN Errno = 108
)

// Errnos are all that the protocol knows.
var Errnos = [...]Errno{EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN}

func (e Errno) String() string {
	switch e {
	case EPERM:
		return "EPERM"
	case EIO:
		return "EIO"
	case ENOMEM:
		return "ENOMEM"
	case EINVAL:
		return "EINVAL"
	case ENOSPC:
		return "ENOSPC"
	case EOVERFLOW:
		return "EOVERFLOW"
	case ENOTSUP:
		return "ENOTSUP"
	case ESHUTDOWN:
		return "ESHUTDOWN"
	}
	return fmt.Sprintf("errno %d", uint32(e))
}

func (e Errno) Error() string { return "NBD " + e.String() }
