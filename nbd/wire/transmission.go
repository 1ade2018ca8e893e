package wire

// Headers is how requests and replies are framed, as agreed in the handshake.
type Headers uint8

const (
	// SimpleReplies is the protocol without any extension.
	SimpleReplies Headers = iota
	// StructuredReplies to READ and BLOCK_STATUS; other replies are simple.
	StructuredReplies
	// ExtendedHeaders on requests and on replies, which are all structured.
	ExtendedHeaders
)

func (h Headers) String() string {
	switch h {
	case SimpleReplies:
		return "simple"
	case StructuredReplies:
		return "structured"
	}
	return "extended"
}

// RequestLen is the length of a request's header.
func (h Headers) RequestLen() int {
	if h == ExtendedHeaders {
		return ExtRequestLen
	}
	return RequestLen
}

// Structured tells whether the answer to c comes in chunks.
func (h Headers) Structured(c Command) bool {
	return h == ExtendedHeaders || h == StructuredReplies && (c == CmdRead || c == CmdBlockStatus)
}

// Request is the header of a request. A write's payload of Length bytes follows
// it, and with extended headers that of any request with FlagPayloadLen.
type Request struct {
	Flags   CommandFlags
	Command Command
	// Cookie is the client's name for the request; replies carry it.
	Cookie uint64
	Offset uint64
	// Length has 32 bits without extended headers.
	Length uint64
}

// AppendRequest appends r.
func AppendRequest(dst []byte, h Headers, r Request) []byte {
	magic := uint32(magicRequest)
	if h == ExtendedHeaders {
		magic = magicExtRequest
	}
	dst = be.AppendUint32(dst, magic)
	dst = be.AppendUint16(dst, uint16(r.Flags))
	dst = be.AppendUint16(dst, uint16(r.Command))
	dst = be.AppendUint64(dst, r.Cookie)
	dst = be.AppendUint64(dst, r.Offset)
	if h == ExtendedHeaders {
		return be.AppendUint64(dst, r.Length)
	}
	return be.AppendUint32(dst, uint32(r.Length))
}

// ParseRequest reads the first h.RequestLen bytes of p, which must be as long.
// It allocates only to fail.
func ParseRequest(p []byte, h Headers) (r Request, err error) {
	_ = p[RequestLen-1]
	magic := be.Uint32(p)
	switch {
	case h == ExtendedHeaders && magic == magicExtRequest:
		r.Length = be.Uint64(p[24:])
	case h != ExtendedHeaders && magic == magicRequest:
		r.Length = uint64(be.Uint32(p[24:]))
	default:
		return r, malformed("request magic is %#x", magic)
	}
	r.Flags = CommandFlags(be.Uint16(p[4:]))
	r.Command = Command(be.Uint16(p[6:]))
	r.Cookie = be.Uint64(p[8:])
	r.Offset = be.Uint64(p[16:])
	return r, nil
}

// AppendStatusPayload appends the payload of a BLOCK_STATUS that names contexts.
func AppendStatusPayload(dst []byte, length uint64, contexts ...uint32) []byte {
	dst = be.AppendUint64(dst, length)
	for _, id := range contexts {
		dst = be.AppendUint32(dst, id)
	}
	return dst
}

// ParseStatusPayload reads the payload of a BLOCK_STATUS that names contexts.
func ParseStatusPayload(p []byte) (length uint64, contexts []uint32, err error) {
	if len(p) < 8 || len(p)%4 != 0 {
		return 0, nil, malformed("block status payload of %d bytes", len(p))
	}
	length = be.Uint64(p)
	for p = p[8:]; len(p) > 0; p = p[4:] {
		contexts = append(contexts, be.Uint32(p))
	}
	return length, contexts, nil
}

// To says which request a reply answers, and how it is framed.
type To struct {
	Cookie uint64
	// Offset is the request's; extended headers repeat it.
	Offset  uint64
	Headers Headers
}

// AppendSimpleReply appends a simple reply; a successful read's data follow it.
func AppendSimpleReply(dst []byte, cookie uint64, e Errno) []byte {
	dst = be.AppendUint32(dst, magicSimple)
	dst = be.AppendUint32(dst, uint32(e))
	return be.AppendUint64(dst, cookie)
}

// Reply is the header of a simple reply or of a chunk of a structured one.
type Reply struct {
	Cookie uint64
	// Simple tells which of the other fields are set.
	Simple bool
	Errno  Errno
	// Done marks the last chunk; a simple reply is always the last.
	Done   bool
	Type   ChunkType
	Length uint64
	// Offset is the request's, with extended headers.
	Offset uint64
}

// ReplyLen tells from the first four bytes of a reply how long its header is;
// 0 if it is none.
func ReplyLen(magic []byte) int {
	switch be.Uint32(magic) {
	case magicSimple:
		return SimpleReplyLen
	case magicStructured:
		return ChunkHeaderLen
	case magicExtReply:
		return ExtChunkHeaderLen
	}
	return 0
}

// ParseReply reads a header of ReplyLen bytes. A chunk's Length is an
// unchecked claim. It allocates only to fail.
func ParseReply(p []byte) (r Reply, err error) {
	switch {
	case len(p) == SimpleReplyLen && be.Uint32(p) == magicSimple:
		return Reply{Simple: true, Done: true, Errno: Errno(be.Uint32(p[4:])), Cookie: be.Uint64(p[8:])}, nil
	case len(p) == ChunkHeaderLen && be.Uint32(p) == magicStructured:
		r.Length = uint64(be.Uint32(p[16:]))
	case len(p) == ExtChunkHeaderLen && be.Uint32(p) == magicExtReply:
		r.Offset, r.Length = be.Uint64(p[16:]), be.Uint64(p[24:])
	default:
		return r, malformed("not a reply")
	}
	r.Done, r.Type, r.Cookie = be.Uint16(p[4:])&ChunkDone != 0, ChunkType(be.Uint16(p[6:])), be.Uint64(p[8:])
	return r, nil
}

func appendChunk(dst []byte, to To, done bool, t ChunkType, n int) []byte {
	magic := uint32(magicStructured)
	if to.Headers == ExtendedHeaders {
		magic = magicExtReply
	}
	dst = be.AppendUint32(dst, magic)
	var flags uint16
	if done {
		flags = ChunkDone
	}
	dst = be.AppendUint16(dst, flags)
	dst = be.AppendUint16(dst, uint16(t))
	dst = be.AppendUint64(dst, to.Cookie)
	if to.Headers == ExtendedHeaders {
		dst = be.AppendUint64(dst, to.Offset)
		return be.AppendUint64(dst, uint64(n))
	}
	return be.AppendUint32(dst, uint32(n))
}

// AppendNone appends the empty last chunk of a reply.
func AppendNone(dst []byte, to To) []byte {
	return appendChunk(dst, to, true, ChunkNone, 0)
}

// AppendOffsetData appends the head of a chunk with n bytes read at off, which
// follow it.
func AppendOffsetData(dst []byte, to To, done bool, off uint64, n int) []byte {
	dst = appendChunk(dst, to, done, ChunkOffsetData, OffsetDataLen+n)
	return be.AppendUint64(dst, off)
}

// AppendOffsetHole appends a chunk that says that the n bytes at off are zero.
func AppendOffsetHole(dst []byte, to To, done bool, off uint64, n int) []byte {
	dst = appendChunk(dst, to, done, ChunkOffsetHole, OffsetHoleLen)
	dst = be.AppendUint64(dst, off)
	return be.AppendUint32(dst, uint32(n))
}

// ParseOffset reads the offset that an OffsetData chunk starts with, or with
// hole the offset and length of an OffsetHole chunk, which must fill p.
func ParseOffset(p []byte, hole bool) (off uint64, n uint32, err error) {
	switch {
	case hole && len(p) == OffsetHoleLen:
		return be.Uint64(p), be.Uint32(p[8:]), nil
	case !hole && len(p) >= OffsetDataLen:
		return be.Uint64(p), 0, nil
	}
	return 0, 0, malformed("content chunk of %d bytes", len(p))
}

// AppendError appends the last chunk of a reply that failed. Text is for people.
func AppendError(dst []byte, to To, e Errno, text string) []byte {
	text = Cut(text)
	dst = appendChunk(dst, to, true, ChunkError, 6+len(text))
	dst = be.AppendUint32(dst, uint32(e))
	dst = be.AppendUint16(dst, uint16(len(text)))
	return append(dst, text...)
}

// AppendErrorOffset appends a chunk that says that the read failed at off.
func AppendErrorOffset(dst []byte, to To, done bool, e Errno, text string, off uint64) []byte {
	text = Cut(text)
	dst = appendChunk(dst, to, done, ChunkErrorOffset, 14+len(text))
	dst = be.AppendUint32(dst, uint32(e))
	dst = be.AppendUint16(dst, uint16(len(text)))
	dst = append(dst, text...)
	return be.AppendUint64(dst, off)
}

// ParseError reads the content of an error chunk of either type. Unknown error
// types are read as ChunkError with anything after the text.
func ParseError(t ChunkType, p []byte) (e Errno, text string, off uint64, err error) {
	if len(p) < 6 {
		return 0, "", 0, malformed("error chunk of %d bytes", len(p))
	}
	e = Errno(be.Uint32(p))
	n := int(be.Uint16(p[4:]))
	rest := len(p) - 6 - n
	if e == 0 || rest < 0 || t == ChunkErrorOffset && rest != 8 || t == ChunkError && rest != 0 {
		return 0, "", 0, malformed("error chunk of %d bytes with %d bytes of text", len(p), n)
	}
	if text, err = checkString(p[6:6+n], "error text"); err != nil {
		return 0, "", 0, err
	}
	if t == ChunkErrorOffset {
		off = be.Uint64(p[6+n:])
	}
	return e, text, off, nil
}

// State is an extent of a metadata context.
type State struct {
	// Length has 32 bits without extended headers, and so have Flags.
	Length uint64
	Flags  uint64
}

// AppendBlockStatus appends a block status chunk.
func AppendBlockStatus(dst []byte, to To, done bool, context uint32, states []State) []byte {
	if to.Headers == ExtendedHeaders {
		dst = appendChunk(dst, to, done, ChunkBlockStatusExt, 8+len(states)*ExtExtentLen)
		dst = be.AppendUint32(dst, context)
		dst = be.AppendUint32(dst, uint32(len(states)))
		for _, s := range states {
			dst = be.AppendUint64(be.AppendUint64(dst, s.Length), s.Flags)
		}
		return dst
	}
	dst = appendChunk(dst, to, done, ChunkBlockStatus, 4+len(states)*ExtentLen)
	dst = be.AppendUint32(dst, context)
	for _, s := range states {
		dst = be.AppendUint32(be.AppendUint32(dst, uint32(s.Length)), uint32(s.Flags))
	}
	return dst
}

// ParseBlockStatus appends the extents of a block status chunk of type t to dst.
func ParseBlockStatus(dst []State, t ChunkType, p []byte) (context uint32, _ []State, err error) {
	head, each := 4, ExtentLen
	if t == ChunkBlockStatusExt {
		head, each = 8, ExtExtentLen
	}
	if len(p) < head+each || (len(p)-head)%each != 0 {
		return 0, dst, malformed("block status of %d bytes", len(p))
	}
	context = be.Uint32(p)
	if n := (len(p) - head) / each; t == ChunkBlockStatusExt && uint64(be.Uint32(p[4:])) != uint64(n) {
		return 0, dst, malformed("block status of %d extents says that it has %d", n, be.Uint32(p[4:]))
	}
	for p = p[head:]; len(p) > 0; p = p[each:] {
		s := State{uint64(be.Uint32(p)), uint64(be.Uint32(p[4:]))}
		if t == ChunkBlockStatusExt {
			s = State{be.Uint64(p), be.Uint64(p[8:])}
		}
		if s.Length == 0 {
			return 0, dst, malformed("empty extent")
		}
		dst = append(dst, s)
	}
	return context, dst, nil
}
