# The password comes from the environment and is written where nobody else reads; a quote in it is doubled.
set -eu
: "${TUNER_PASSWORD:?set TUNER_PASSWORD, the password of the database}"
umask 077
printf '"tuner" "%s"\n' "$(printf %s "$TUNER_PASSWORD" | sed 's/"/""/g')" > /tmp/userlist.txt
exec pgbouncer /etc/pgbouncer/pgbouncer.ini
