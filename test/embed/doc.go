// Package embed is a program's view of Firn's NBD packages: a module of its own
// that imports them as anybody would. Its tests are what docs/nbd-library.md
// shows.
package embed
